"""The embedded corpus: an encyclopedia of a made-up world, with facts that can be asked for."""

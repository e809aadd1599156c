"""What a run did, from its manifests."""

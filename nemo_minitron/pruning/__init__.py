"""Planning and cutting."""

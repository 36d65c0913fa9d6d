"""Settings: schema, tree and loading."""

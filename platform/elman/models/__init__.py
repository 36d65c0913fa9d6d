"""Language models as plain nn.Modules."""

"""Everything that is recorded, and how it is compared."""

"""The block table: shares of work, owners, and a digest that tells any difference."""

"""The training side: capture, exchange with the owners, installs."""

"""What people do to a study from any shell: look, change, exchange, compare, repeat."""

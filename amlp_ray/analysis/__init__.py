"""What a run and its masks look like: pictures, diagnosis after every epoch, and how rules and readers compare."""

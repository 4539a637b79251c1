"""What a run keeps to go on from and to take away, and the weights it may start from."""

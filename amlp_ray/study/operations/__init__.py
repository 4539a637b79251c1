"""Read and change a study from any shell: status, trials, edit, transfer, replay, compare."""

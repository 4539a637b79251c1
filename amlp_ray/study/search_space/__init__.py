"""What is searched: declared, checked, asked of Optuna."""

"""Where a run's metrics go: its file, TensorBoard, MLflow and W&B; and what FLOPs and MFU are."""

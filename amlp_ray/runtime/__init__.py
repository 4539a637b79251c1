"""The Ray side of running: sessions, metrics. Everything that must be set before `import ray` is set in one place."""

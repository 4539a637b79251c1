"""The Ray side of running: sessions, resources, groups of workers, dashboard metrics."""

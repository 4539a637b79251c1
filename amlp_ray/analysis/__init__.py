"""Analysis of runs and datasets: inspection, localization of lesions by rules, throughput."""

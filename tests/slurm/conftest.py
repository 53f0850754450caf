"""What the tests here share: a cluster that is up, and its jobs' history beside each failure."""

from tests.cluster import cluster, cluster_to_break, module_cluster, pytest_runtest_makereport, shared_cluster

__all__ = ["cluster", "cluster_to_break", "module_cluster", "pytest_runtest_makereport", "shared_cluster"]

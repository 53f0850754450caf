"""What the tests here share: the cluster that is up, and jobs' history beside failures."""

from tests.cluster import cluster, cluster_to_break, module_cluster, pytest_runtest_makereport, shared_cluster

__all__ = ["cluster", "cluster_to_break", "module_cluster", "pytest_runtest_makereport", "shared_cluster"]

"""The Ray cluster of a run: connection, nodes, resources, the run lock, and Ray Data over chunks."""

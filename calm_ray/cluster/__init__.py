"""The Ray cluster of a run: connection, nodes, resources, one driver a run; Ray Data over chunks."""

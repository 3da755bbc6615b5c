"""Real clusters that lose their nodes, while processes write to them.

``make cluster`` starts Patroni and Galera clusters of three nodes each, on hosts of their own that
are network namespaces of this machine, and prints a line of figures for each scenario. What they
are made of is installed by ``tests/cluster/install.sh``. Plain ``pytest`` leaves all of it out.
``HYBRID_STORAGE_CLUSTER=short`` injects one fault of each kind, as ``.ci/run`` does where the
packages are there.
"""

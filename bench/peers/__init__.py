"""Other engines, each driven as bench_peers.py wants it."""

NO_PEER = 3  # exit status of a bench one of whose peers is absent: it claims nothing of that one

"""Benchmarks against real servers: `make bench` measures, locustfile.py is for load tests of a deployment."""

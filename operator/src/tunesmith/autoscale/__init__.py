"""Scaling decisions: demand and copies per adapter, pods per pool. Pure: no I/O."""

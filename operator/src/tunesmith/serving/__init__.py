"""Decisions about ServingPools and AdapterDeployments: pool, placement, rollout. Pure: no I/O."""

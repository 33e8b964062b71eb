"""Settings of the operator that reach the pods of ServingPools."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.contracts.settings import DEFAULT_MAX_ADAPTER_RATIO, ChartValue, StorageSize, WorkloadSettings


class PoolSettings(WorkloadSettings):
    """Settings of pool pods."""

    agent_image: Annotated[str, ChartValue("images.agent", 'include "tunesmith.image" (list . "agent")')]
    """Image of the agent in pool pods."""
    engine_image: Annotated[str, ChartValue("images.engine", 'include "tunesmith.image" (list . "engine")')]
    """vLLM image of pools without `engine.image`."""
    adapter_storage: Annotated[StorageSize, ChartValue("serving.adapterStorage")] = "20Gi"
    """Disk space that the adapters of a pool pod may use on its node, in Mi or Gi."""
    base_model_storage: Annotated[StorageSize, ChartValue("serving.baseModelStorage")] = "500Gi"
    """Disk space that the downloaded base model of a pool pod may use on its node, in Mi or Gi."""
    max_adapter_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False), ChartValue("serving.maxAdapterRatio")] = (
        DEFAULT_MAX_ADAPTER_RATIO
    )
    """Highest norm of an adapter's change to the weights of a module, relative to the norm of these weights; adapters
    above it are refused."""

"""Reasons for which the kubelet reports that a container is waiting.

Source: pkg/kubelet/images/types.go and pkg/kubelet/container/sync_result.go of Kubernetes.
"""

from __future__ import annotations

IMAGE_PULL_REASONS = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
)
"""The image cannot be pulled."""
CONFIGURATION_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
"""The container cannot be created or started, such as without a Secret that it needs."""

"""The custom resources of `tunesmith.dev/v1alpha1` and the generator of their CRDs."""

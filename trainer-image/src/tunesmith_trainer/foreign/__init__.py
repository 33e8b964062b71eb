"""Import of adapters that other trainers wrote: read, converted where that is exact, checked, and published."""

"""The demo: two deltas on one real pretrained model, trained, swapped, detached, saved and reloaded."""

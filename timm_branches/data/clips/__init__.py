"""Clips: videos and folders of frames as (T, C, H, W), with labels on several levels."""

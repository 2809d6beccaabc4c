"""Folders that appear whole or not at all; the lower rooms use them too."""

from qlora_dist.config.folders import cache_root, folder_lock, publish_folder

__all__ = ["cache_root", "folder_lock", "publish_folder"]

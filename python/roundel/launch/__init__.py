"""Starting a job and finding one's place in it: `roundelrun` (run.py) and detect.detect()."""

from .detect import Launch, LaunchError

__all__ = ["Launch", "LaunchError"]

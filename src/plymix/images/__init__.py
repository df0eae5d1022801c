"""Models -> pictures: what `plymix compare` and `plymix blocks` are made of.

A backend makes pictures with one model at a time (`base.Backend`; one file each: `diffusers`,
`a1111`, `comfyui`, `fake`). What shall be drawn is a sheet (`grid`): rows are merges (`rows`), the
other axes settings of a picture or of the merge. `compare` draws it, cell by cell.

Importing this needs neither torch nor Pillow; drawing does.
"""

from plymix.images.base import BACKENDS, SAMPLERS, Backend, Options, Settings, open_backend

__all__ = ["BACKENDS", "SAMPLERS", "Backend", "Options", "Settings", "open_backend"]

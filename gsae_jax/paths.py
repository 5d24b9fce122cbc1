"""Workdirs: a folder or gs://. Files in them appear whole."""

from etils import epath

from gsae_jax.errors import UserError


def split(path: str) -> tuple[str, str]:
  """Scheme and what follows its `://`; no scheme and the path, of a folder.

  `gs:/x` has a scheme too, and nothing behind it; `2026-11-21T10:00` has none.
  """
  scheme, colon, place = path.partition(':')
  if not colon or not (scheme.isalpha() or scheme == 's3'):
    return '', path
  return scheme, place[2:] if place.startswith('//') else ''


def workdir(path: str, flag: str = '--workdir') -> epath.Path:
  """The path of a workdir, which a flag gave.

  Raises:
    UserError: it is on storage that has no checkpoints, or gcsfs is missing.
  """
  scheme, place = split(path)
  if scheme == 'gs' and not place.partition('/')[0]:
    raise UserError(f'{flag}: {path} has no bucket; give gs://BUCKET/PATH')
  if scheme not in ('', 'gs'):
    raise UserError(
      f'{flag}: {path}: checkpoints cannot be on {scheme}://; give a local '
      'folder or gs://'
    )
  if scheme == 'gs':
    try:
      import fsspec
      import gcsfs  # noqa: F401
    except ImportError as e:
      raise UserError(
        f'{flag}: {path} needs gcsfs; pip install "gsae_jax[gcs]"'
      ) from e
    # Else a listing is never read again, and what others write never seen.
    options = fsspec.config.conf.setdefault('gcs', {})
    options.setdefault('use_listings_cache', False)
    return epath.Path(path)
  return epath.Path(path).expanduser().absolute()


def is_remote(path: epath.Path) -> bool:
  return '://' in str(path)


def write_whole(path: epath.Path, content: str | bytes) -> None:
  """Writes a file so that no reader sees a part of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  raw = content.encode() if isinstance(content, str) else content
  if is_remote(path):  # An object in a bucket is whole or not there.
    path.write_bytes(raw)
    return
  part = path.parent / f'{path.name}.part'
  part.write_bytes(raw)
  part.replace(path)

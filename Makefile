# The README's commands by short names. PYTHON=python3.12 picks the interpreter of a new .venv.
.PHONY: tiny gsm8k test check golden

tiny: ## train the tiny pair
	bash examples/run_sead_tiny.sh

gsm8k: ## a few steps on GSM8K's problems
	bash examples/run_sead_gsm8k.sh

test: ## all checks and tests
	bash tests/run.sh

check: ## what takes seconds: style, types, structure
	bash -c 'source examples/setup_environment.sh && "$$VENV_PYTHON" -m ruff check . && "$$VENV_PYTHON" -m ruff format --check . && "$$VENV_PYTHON" -m mypy && "$$VENV_PYTHON" -m pytest -q tests/test_architecture.py'

golden: ## run the golden trajectories again and store them; prints what changed
	bash -c 'source examples/setup_environment.sh && "$$VENV_PYTHON" -m tests.training.golden'

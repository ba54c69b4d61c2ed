"""The tiny pair: problems whose answers hold, sets that do not overlap, and a shipped pair that is what it claims."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "tiny"
sys.path.insert(0, str(ROOT / "tools"))

from make_tiny_pair import app  # noqa: E402  (the tools are commands, not a package)
from tiny_pair.answers import MAX_NEW_TOKENS, accuracy, is_right, prompt_token_ids  # noqa: E402
from tiny_pair.models import Shape, build_model, save_model  # noqa: E402
from tiny_pair.problems import LEVELS, Problem, draw_problem, draw_problems, make_problem_sets  # noqa: E402
from tiny_pair.tokenizer import train_tokenizer  # noqa: E402

SMALL = ["--teacher-size", "64,2,64", "--student-size", "64,2,32", "--layers", "2"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def problem_of(row: dict) -> Problem:
    expression = row["prompt"].removeprefix("Mod ten, left to right: ").removesuffix("=")
    return Problem(tuple(map(int, expression[::2])), tuple(expression[1::2]))


def evaluate(expression: str) -> int:
    """An expression of digits and operators, worked by Python with explicit parentheses from the left."""
    code = expression[0]
    for operator, digit in zip(expression[1::2], expression[2::2], strict=True):
        code = f"({code}{operator}{digit})"
    return eval(code) % 10


class TestProblems:
    def test_worked_example(self):
        problem = Problem((3, 7, 6, 4), ("-", "*", "+"))  # 3-7=-4 -> 6, 6*6=36 -> 6, 6+4=10 -> 0
        assert problem.prompt == "Mod ten, left to right: 3-7*6+4="
        assert problem.answer == 0
        assert problem.level == 3

    def test_answers_agree_with_python(self):
        rng = random.Random(1)
        for _ in range(500):
            problem = draw_problem(rng, rng.choice(LEVELS))
            expression = problem.prompt.split(": ")[1].rstrip("=")
            assert problem.answer == evaluate(expression)
            assert len(problem.digits) == problem.level + 1

    def test_every_step_of_a_solution_is_true(self):
        rng = random.Random(2)
        shapes = set()
        for _ in range(500):
            problem = draw_problem(rng, rng.choice(LEVELS))
            *steps, boxed = problem.solution(rng).split("; ")
            assert boxed == f"\\boxed{{{problem.answer}}}"
            value = problem.digits[0]
            for step, operator, digit in zip(steps, problem.operators, problem.digits[1:], strict=True):
                left, right = step.split("=")
                if left == f"{operator}{digit}":
                    shapes.add("short")
                    left = f"{value}{left}"
                else:
                    shapes.add("plain" if left == f"{value}{operator}{digit}" else "swapped")
                    sign = "+" if left[0] == "-" else operator
                    assert sorted(left.removeprefix("-")) == sorted(f"{value}{digit}{sign}")
                assert eval(left) % 10 == int(right)
                value = int(right)
        assert shapes == {"plain", "swapped", "short"}

    def test_sets_are_disjoint_and_levelled(self):
        sets = make_problem_sets(seed=5, pool_size=400, heldout_per_level=30)
        assert [problem.level for problem in sets.heldout] == [level for level in LEVELS for _ in range(30)]
        assert len(sets.pool) == len(set(sets.pool)) == 400
        assert not set(sets.pool) & set(sets.heldout)
        assert len(sets.reserved) == 550
        assert {problem.level for problem in sets.pool} == set(LEVELS)

    def test_seed_decides(self):
        assert make_problem_sets(1, 100, 10) == make_problem_sets(1, 100, 10)
        assert make_problem_sets(1, 100, 10) != make_problem_sets(2, 100, 10)

    def test_excluded_problems_are_never_drawn(self):
        first = draw_problems(random.Random(0), 1, 250, exclude=frozenset())
        rest = draw_problems(random.Random(0), 1, 50, exclude=frozenset(first))
        assert not set(first) & set(rest)
        with pytest.raises(ValueError, match="level 1 has 50 problems left of 300: 51 are too many"):
            draw_problems(random.Random(0), 1, 51, exclude=frozenset(first))


class TestGrading:
    def test_last_box_counts(self):
        problem = Problem((1, 2), ("+",))
        assert is_right(problem, "\\boxed{7} \\boxed{3}")
        assert not is_right(problem, "\\boxed{3} \\boxed{7}")
        assert not is_right(problem, "1+2=3; ")


class TestTokenizer:
    def test_digits_and_box_are_single_tokens_and_any_text_survives(self):
        problem = Problem((3, 7, 6), ("-", "*"))
        tokenizer = train_tokenizer([problem.prompt, "3-7=6; \\boxed{6}", "12", "user\n", "assistant\n"] * 2)
        assert tokenizer.tokenize("12") == ["1", "2"]
        tokens = tokenizer.tokenize("3-7=6; \\boxed{6}")
        assert [token.replace("Ġ", " ") for token in tokens] == ["3", "-", "7", "=", "6", "; ", "\\boxed{", "6", "}"]
        text = "Grüße, 12 <x>\n\\boxed{42}"
        assert tokenizer.decode(tokenizer.encode(text)) == text


class TestModels:
    def test_saved_model_is_the_one_that_was_built(self, tmp_path):
        """The configuration is written in another form than transformers' own; logits must not notice."""
        tokenizer = train_tokenizer(["some text"] * 2)
        model = build_model(Shape(64, 2, 32, layers=2), tokenizer, seed=3)
        save_model(model, tokenizer, tmp_path)
        assert "rope_scaling" in json.loads((tmp_path / "config.json").read_text())
        tokens = torch.randint(len(tokenizer), (1, 70), generator=torch.Generator().manual_seed(0))  # > window, > 32
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
            assert torch.equal(logits, model(tokens).logits)
            assert not torch.equal(logits, build_model(Shape(64, 2, 32, layers=2), tokenizer, seed=4)(tokens).logits)


class TestCommand:
    def test_random_pair_with_a_given_tokenizer(self, tmp_path):
        tokenizer = train_tokenizer(["some other text"] * 2)
        json_file = tmp_path / "other.json"
        tokenizer.backend_tokenizer.save(str(json_file))
        arguments = ["--output", str(tmp_path / "pair"), "--random", "--tokenizer", str(json_file), *SMALL]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        for name in ("teacher", "student"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / name)
            loaded = AutoTokenizer.from_pretrained(tmp_path / "pair" / name)
            assert model.config.vocab_size == len(loaded) == len(tokenizer)
            assert loaded.encode("some text") == tokenizer.encode("some text")
            assert model.generation_config.eos_token_id[0] == loaded.eos_token_id
        assert not (tmp_path / "pair" / "prompts.jsonl").exists()

    def test_training_writes_everything_and_the_seed_decides(self, tmp_path):
        """Two steps of training: the files, not the accuracy."""
        arguments = ["--teacher-steps", "2", "--student-accuracy", "0", "--prompts", "20", "--heldout", "2"]
        for name in ("one", "two"):
            command = ["--output", str(tmp_path / name), *arguments, "--samples", "2", *SMALL]
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
        for file in ("teacher/model.safetensors", "student/model.safetensors", "prompts.jsonl", "heldout.jsonl"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--teacher-size", "128"], "must be three integers HIDDEN,KV_HEADS,FFN"),
            (["--student-size", "100,2,64"], "hidden size 100: must be a multiple of the head size, 32"),
            (["--student-size", "128,3,64"], "3 key-value heads: must divide its 4 heads"),
            (["--heldout", "300"], "level 1 has 0 problems left of 300"),
            (["--tokenizer", "x.json"], "only with --random"),
            (["--random", "--tokenizer", "missing.json"], "missing.json: not a file of the tokenizers library"),
        ],
    )
    def test_mistakes_are_one_line_and_leave_nothing(self, tmp_path, arguments, complaint):
        result = CliRunner().invoke(app, ["--output", str(tmp_path / "pair"), *arguments])
        assert result.exit_code == 2
        assert complaint in result.output
        assert result.output.count("\n") == 1
        assert not (tmp_path / "pair").exists() or not any((tmp_path / "pair").iterdir())

    def test_existing_output_is_kept_unless_it_is_ours_and_told(self, tmp_path):
        def run(*more: str) -> Result:
            return CliRunner().invoke(app, ["--output", str(tmp_path / "pair"), "--random", *SMALL, *more])

        assert run().exit_code == 0
        assert "give --overwrite" in run().output
        assert run("--overwrite").exit_code == 0
        (tmp_path / "pair/teacher/README.md").write_text("mine")
        result = run("--overwrite")
        assert result.exit_code == 2
        assert "holds teacher/README.md, which this tool did not write" in result.output
        assert (tmp_path / "pair/teacher/README.md").read_text() == "mine"


class TestShippedPair:
    @pytest.fixture(scope="class")
    def rows(self) -> dict[str, list[dict]]:
        return {
            name: [json.loads(line) for line in (SHIPPED / f"{name}.jsonl").read_text().splitlines()]
            for name in ("prompts", "heldout")
        }

    def test_size(self):
        assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 6e6

    def test_rows(self, rows):
        for name, of_set in rows.items():
            assert len({row["id"] for row in of_set}) == len(of_set)
            for row in of_set:
                problem = problem_of(row)
                assert row["prompt"] == problem.prompt
                assert int(row["answer"]) == evaluate(row["prompt"].split(": ")[1].rstrip("="))
                assert row["level"] == str(problem.level)
                assert row["difficulty"] * 8 in range(9), name
        assert not {row["prompt"] for row in rows["prompts"]} & {row["prompt"] for row in rows["heldout"]}

    def test_models_can_be_split_over_two_ranks(self):
        for name in ("teacher", "student"):
            config = AutoModelForCausalLM.from_pretrained(SHIPPED / name).config
            assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == config.num_hidden_layers % 2 == 0
            assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"
            theta = {parameters["rope_theta"] for parameters in config.rope_parameters.values()}
            assert len(theta) == 1

    def test_both_speak_the_same_tokens(self):
        student, teacher = (AutoTokenizer.from_pretrained(SHIPPED / name) for name in ("student", "teacher"))
        assert student.get_vocab() == teacher.get_vocab()
        assert student.chat_template == teacher.chat_template is not None

    def test_sequences_fit_and_exceed_the_window(self, rows):
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "student")
        window = AutoModelForCausalLM.from_pretrained(SHIPPED / "student").config.sliding_window
        rng = random.Random(0)
        totals = []
        for row in rows["prompts"]:
            problem = problem_of(row)
            response = len(tokenizer.encode(problem.solution(rng))) + 1
            assert response <= MAX_NEW_TOKENS
            totals.append(len(prompt_token_ids(problem, tokenizer)) + response)
        assert max(totals) > window

    @pytest.mark.parametrize(("name", "lowest", "highest"), [("teacher", 0.95, 1.0), ("student", 0.25, 0.55)])
    def test_teacher_is_good_and_student_is_not(self, rows, name, lowest, highest):
        """Greedy, on half of the held-out problems, all levels: seconds. The full figures are in recipe.json."""
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED / name)
        model = AutoModelForCausalLM.from_pretrained(SHIPPED / name)
        problems = [problem_of(row) for row in rows["heldout"]][::2]
        assert lowest <= accuracy(model, tokenizer, problems, greedy=True) <= highest

"""The reader of compiled programs: on snippets as XLA for TPU writes them, and on real programs."""

import jax
import jax.numpy as jnp
import pytest

from ecomjax.experiments.hlo import ArrayType, Program

LOOP = """\
HloModule jit_f, is_scheduled=true, replica_count=2, num_partitions=4

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %state = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)S(1)}}) parameter(0)
  %number = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %one = s32[] constant({step})
  %next = s32[] add(%number, %one), metadata={{op_name="jit(f)/while(body)" id=3}}
  %x = f32[8,128]{{1,0:T(8,128)S(1)}} get-tuple-element(%state), index=1
  ROOT %out = (s32[], /*index=1*/f32[8,128]{{1,0:T(8,128)S(1)}}) tuple(%next, %x)
}}

%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction={direction}
}}

%condition (state.1: (s32[], f32[8,128])) -> pred[] {{
  %state.1 = (s32[], f32[8,128]) parameter(0)
  %number.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = {limit}
  ROOT %fused = pred[] fusion(%number.1, %limit), kind=kLoop, calls=%compared
}}

ENTRY %main (x.1: f32[8,128]) -> f32[8,128] {{
  %x.1 = f32[8,128] parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %first = (s32[], f32[8,128]) tuple(%copied, %x.1)
  %loop = (s32[], f32[8,128]) while(%first), condition=%condition, body=%body{known}
  ROOT %last = f32[8,128] get-tuple-element(%loop), index=1
}}
"""


def loop(step=1, direction="LT", limit="s32[] constant(10)", start=0, known=""):
    return Program(
        LOOP.format(step=step, direction=direction, limit=limit, start=start, known=known)
    )


@pytest.mark.parametrize(
    ("given", "trips"),
    [
        ({}, 10),
        ({"start": 4}, 6),
        ({"step": 2}, 5),
        ({"step": 3, "start": 1}, 3),
        ({"direction": "LE"}, 11),
        ({"start": 20}, 0),
        ({"known": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
    ],
)
def test_trip_count(given, trips):
    program = loop(**given)
    times = {run.computation.name: run.times for run in program.runs()}
    assert times == {"main": 1, "body": trips}
    assert not program.unbounded


def test_a_loop_whose_length_depends_on_data_counts_once_and_is_named():
    program = loop(limit="s32[] get-tuple-element(%state.1), index=0")
    assert {run.computation.name: run.times for run in program.runs()} == {"main": 1, "body": 1}
    assert program.unbounded == ["loop"]


def test_what_a_line_says():
    program = loop()
    assert program.devices == 8
    assert program.entry.name == "main"
    out = program.computations["body"].instructions["out"]
    near = ArrayType("f32", (8, 128), near=True)
    assert out.arrays == (ArrayType("s32", ()), near)
    assert out.operands == ("next", "x") and out.bytes == 4 + 4096
    assert program.computations["body"].root == "out"
    assert program.computations["compared"].parameters == ("a", "b")
    (user,) = program.computations["body"].users["number"]
    assert user.name == "next"


def test_bytes_of_narrow_types():
    assert ArrayType("s4", (8, 2)).bytes == 8
    assert ArrayType("bf16", (3,)).bytes == 6
    assert ArrayType("f8e4m3fn", (3,)).bytes == 3
    assert ArrayType("token", ()).bytes == 0


def test_every_branch_of_a_conditional_runs_once():
    program = Program("""\
HloModule jit_f

%yes (a: f32[]) -> f32[] {
  ROOT %a = f32[] parameter(0)
}

%no (b: f32[]) -> f32[] {
  ROOT %b = f32[] parameter(0)
}

ENTRY %main (p: s32[], x: f32[]) -> f32[] {
  %p = s32[] parameter(0)
  %x = f32[] parameter(1)
  ROOT %c = f32[] conditional(%p, %x, %x), branch_computations={%yes, %no}
}
""")
    assert [(run.computation.name, run.times) for run in program.runs()] == [
        ("main", 1),
        ("yes", 1),
        ("no", 1),
    ]


@pytest.mark.parametrize("text", ["", "HloModule jit_f\n\nstray words\n"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="no compiled program"):
        Program(text)


def test_loops_of_a_real_program_multiply():
    @jax.jit
    def f(x):
        def inner(x, _):
            return jnp.cos(x), None

        def outer(x, _):
            return jnp.sin(jax.lax.scan(inner, x, None, length=7)[0]), None

        return jax.lax.scan(outer, x, None, length=3)[0]

    program = Program(f.lower(jnp.ones(4)).compile().as_text())
    times = {
        each.opcode: run.times
        for run in program.runs()
        for each in run.computation.instructions.values()
    }
    assert (times["cosine"], times["sine"]) == (21, 3)
    assert not program.unbounded

"""Reading collectives from compiled text: all syntaxes, loops, asynchronous pairs, and real programs over eight devices."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from planner_world import ROOT

from novajax.core.errors import InternalError
from novajax.planner.hlo import Found, read_collectives

MODULE = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {{
  %x = f32[8,16]{{1,0}} parameter(0)
{lines}
}}
"""


def read(*lines: str) -> Counter[Found]:
    return read_collectives(MODULE.format(lines="\n".join(f"  {line}" for line in lines)))


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=2,'tensor'=4] {'tensor'}", 4),
        ("mesh['data'=2,'tensor'=4] {'data','tensor'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]) {'axis_0'}", 2),
        ("mesh['a'=8] {'a':(2)2}", 2),
        ("{}", 8),
    ],
)
def test_replica_groups_in_every_syntax(groups, size):
    assert read(f"%r.1 = f32[8,16]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add") == {
        Found("all-reduce", size, 512): 1
    }


def test_groups_that_are_not_understood_are_an_error():
    with pytest.raises(InternalError, match="replica groups"):
        read("%r = f32[8]{0} all-reduce(%x), replica_groups=new['x'], to_apply=%add")


def test_asynchronous_pairs_count_once_with_the_result_s_bytes():
    found = read(
        "%s = (f32[8,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}",
        "%d = f32[64,16]{1,0} all-gather-done(%s)",
        "%p = (bf16[4,4]{1,0}, bf16[4,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{4,5}}",
        "%q = bf16[4,4]{1,0} collective-permute-done(%p)",
        "%t = (f32[8]{0}, f32[8,2]{1,0}) all-reduce(%x, %x), replica_groups=[1,8]<=[8], to_apply=%add",
    )
    sums = {Found("all-reduce", 8, 32): 1, Found("all-reduce", 8, 64): 1}
    assert found == {Found("all-gather", 8, 4096): 1, Found("collective-permute", 3, 32): 1} | sums
    aliased = "%a = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), replica_groups=[1,8]<=[8], to_apply=%add"
    assert read(aliased, "%b = f32[8]{0} all-reduce-done(%a)") == {Found("all-reduce", 8, 32): 1}


def test_real_programs_over_eight_devices():
    script = Path(__file__).with_name("hlo_programs.py")
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mlp"] == [["all-reduce", 4, 8 * 256 * 4, 1]]
    assert found["loop"] == [["all-reduce", 4, 8 * 256 * 4, 5]]
    assert found["bfloat16"] == [["all-reduce", 8, 8 * 256 * 2, 1]]  # float32 in the text, halved
    assert found["manual"] == [
        ["all-gather", 2, 2 * 4 * 256 * 4, 1],
        ["collective-permute", 4, 4 * 256 * 4, 1],
        ["reduce-scatter", 4, 4 * 256 * 4, 1],
    ]

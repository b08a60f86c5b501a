"A short search does what it did: against the committed table, within what rounding does to it"
import json,sys
from pathlib import Path
import pytest

BENCHMARKS = Path(__file__).parents[1]/'benchmarks'

@pytest.fixture
def behaviour(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__('behaviour')
    for name in ('behaviour','common'): sys.modules.pop(name, None)

@pytest.mark.parametrize('setting', ['default','paper'])
def test_a_short_search_on_the_digits(behaviour, setting):
    d = json.loads(behaviour.FILE.read_text())
    old = next(r for r in d['runs'] if (r['task'],r['setting'],r['seed'])==('digits',setting,0))
    new = behaviour.measured('digits', setting, 0)
    far,allowed = behaviour.apart(new, old),d['tolerance'][f'digits {setting}']
    assert all(far[k]<=allowed[k] for k in far), far

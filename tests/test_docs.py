"The documentation, without building it: every notebook has its place, and what pages and README name is there"
import json,re
from pathlib import Path
import pytest,yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
NAMES = [re.sub(r'^\d[0-9a-z]*_', '', f.stem) for f in NOTEBOOKS]

def prose(f):
    "The markdown of a notebook or of a file"
    if f.suffix=='.md': return f.read_text('utf8')
    return '\n'.join(''.join(c['source']) for c in json.loads(f.read_text('utf8'))['cells'] if c['cell_type']=='markdown')

def pages(nav):
    for o in nav: yield from [o] if isinstance(o, str) else (p for v in o.values() for p in pages([v] if isinstance(v, str) else v))

def test_every_notebook_is_in_the_navigation_once():
    nav = list(pages(yaml.safe_load((ROOT/'mkdocs.yml').read_text('utf8'))['nav']))
    assert sorted(nav)==sorted([*(f'{n}.md' for n in NAMES),'changelog.md'])

@pytest.mark.parametrize('f', [ROOT/'README.md',*NOTEBOOKS], ids=lambda f: f.stem)
def test_what_is_named_is_there(f):
    text = prose(f)
    notebooks = set(re.findall(r'\]\(([^):]+\.ipynb)', text))
    assert notebooks <= {o.name for o in NOTEBOOKS}
    assert set(re.findall(r'hba-fastai\.github\.io/hba-fastai/(\w+)\.html', text)) <= set(NAMES)
    files = re.findall(r'`(benchmarks/[\w/]+\.\w+)`', text)
    assert [o for o in files if not (ROOT/o).exists()]==[]

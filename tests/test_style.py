"What a reader may rely on: no long lines, no long modules, and no name that pytest would take for a test"
import ast,json,re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = [f for f in sorted((ROOT/'hba_fastai').glob('*.py')) if f.name!='_modidx.py'] # which nbdev generates
SOURCES = [*MODULES, *(f for d in ('tests','benchmarks','tools') for f in sorted((ROOT/d).glob('**/*.py'))), *sorted((ROOT/'nbs').glob('*.ipynb'))]

def code_of(f):
    "[(where, line)] of a file of Python or of the code cells of a notebook"
    name = f.relative_to(ROOT)
    if f.suffix=='.py': return [(f'{name}:{i}', l) for i,l in enumerate(f.read_text().splitlines(), 1)]
    cells = [c for c in json.loads(f.read_text())['cells'] if c['cell_type']=='code']
    return [(f"{name}:cell {c['id']}:{i}", l) for c in cells for i,l in enumerate(''.join(c['source']).splitlines(), 1)]

def test_the_sources_are_found(): assert len(MODULES)>20 and {f.suffix for f in SOURCES}=={'.py','.ipynb'} and Path(__file__) in SOURCES

def test_no_line_is_longer_than_160_columns(): assert [(where,len(l)) for f in SOURCES for where,l in code_of(f) if len(l)>160]==[]

def test_no_module_is_longer_than_300_lines(): assert [(f.name,len(code_of(f))) for f in MODULES if len(code_of(f))>300]==[]

def test_no_name_in_the_package_looks_like_a_test():
    "`from hba_fastai.x import *` in somebody's test file would make a test of it"
    assert [(where,l) for f in MODULES for where,l in code_of(f) if l.lstrip().startswith(('def test','class Test'))]==[]

def test_nothing_opens_a_connection():
    "SECURITY.md says so: no module imports what could"
    network = 'socket','urllib','http','requests','ftplib','smtplib','fastdownload','huggingface_hub'
    of = lambda node: [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) else []
    imported = [(f.name,name) for f in MODULES for node in ast.walk(ast.parse(f.read_text())) for name in of(node)]
    assert len(imported)>100 and [o for o in imported if o[1].split('.')[0] in network]==[]

def test_the_version_has_one_place():
    says = lambda f: f.is_file() and re.search(r'(?m)^ *(__)?version(__)? *=  *.?\d', f.read_text())
    assert [f.name for f in [*ROOT.glob('*.*'),*MODULES] if says(f)]==['__init__.py']

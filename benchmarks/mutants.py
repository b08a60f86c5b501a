"""Do the tests notice a small change of the code? One thing of a module is changed at a time, and the tests of that module run.

    nice python benchmarks/mutants.py hyper policy space schedule checkpoint    # runs what is missing, then writes results/mutants.md
    python benchmarks/mutants.py policy --again                                # survivors once more, after tests were added

Tools for this skip decorated functions, and most here are `@patch`ed. Each mutant lives in a fork of a process that has imported what takes long, where an
import hook gives the changed source for the one module: no file of the tree is written. The examples of notebooks are tests, so they run as well. A mutant
that takes more than `LIMIT` seconds of processor time, or ten times that by the clock, counts as killed.
results/mutants.jsonl: module, line, kind of change, before and after (the source), first (what killed it: a test, a notebook, 'import', 'time'; or 'survived'),
now (the same after tests were added), why (written by hand: why nobody could notice this one, or needs to).
Not made: changes of docstrings, of annotations, of `__all__`, of messages and other formatted text, and of what is printed (`__repr__`); assignments to a
local name are not dropped, which any test notices.
"""
import argparse,ast,copy,datetime,json,os,platform,resource,shutil,signal,sys,tempfile,time
import fastai,pytest,torch
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from zlib import crc32

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT/'benchmarks'/'results'/'mutants.jsonl'
LIMIT = 120
BEFORE = ['fastai.vision.all','IPython','matplotlib.pyplot','pandas','timm','torchvision.transforms.v2'] # imported once, in front of all forks
TESTS = { # of each module, what is fast or likely to notice first
    'space': ['nbs/00_space.ipynb', 'tests/test_schedule.py', 'tests/test_policy.py', 'tests/test_policies.py'],
    'policy': ['nbs/02_policy.ipynb', 'nbs/02f_smoothing.ipynb', 'tests/test_policies.py', 'tests/test_policy.py'],
    'hyper': ['nbs/03_hyper.ipynb', 'tests/test_hyper.py'],
    'schedule': ['nbs/04_schedule.ipynb', 'tests/test_schedule.py', 'tests/test_plots.py', 'tests/test_report.py', 'tests/test_policies.py'],
    'checkpoint': ['nbs/06_checkpoint.ipynb', 'tests/test_checkpoint.py']}
NOT_RUN = ['sigkill', 'needs_neither', # in a new interpreter, where no hook is
    'dark_target', 'bit_for_bit', 'second_moment', 'error_leaves', 'any_range', 'replayed_elsewhere', 'hyperparameters_by_name', 'object_given',
    'old_checkpoints', 'a_report_speaks', 'two_policies'] # fits, which take long

# --- what is changed

SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}
TWINS = {'min': 'max', 'max': 'min', 'amin': 'amax', 'amax': 'amin', 'any': 'all', 'all': 'any'}
NOT_CHANGED = ast.Raise,ast.JoinedStr,ast.Import,ast.ImportFrom

def but(node, **fields):
    "A copy of `node` with other fields"
    new = copy.copy(node)
    vars(new).update(fields)
    return new

def constants(v) -> list:
    "What stands where the constant `v` stood"
    if isinstance(v, bool): return [not v]
    if isinstance(v, int): return [v+1,v-1]
    if isinstance(v, float): return [2*v if v else 1.]
    return [('X' if isinstance(v, str) else b'X')+v] if isinstance(v, (str,bytes)) else []

def changes(node) -> list: # [(kind, node that is replaced, its replacement)]
    "All that is changed at `node` itself"
    out,number = [],lambda o, by: ast.BinOp(o, ast.Add() if by>0 else ast.Sub(), ast.Constant(1))
    def add(kind, new, old=node): out.append((kind,old,new))
    match node:
        case ast.Compare():
            for i,op in enumerate(node.ops): add('comparison', but(node, ops=[SWAPS[type(op)]() if i==j else o for j,o in enumerate(node.ops)]))
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp():
            if type(node.op) in SWAPS: add('and, or' if isinstance(node, ast.BoolOp) else 'arithmetic', but(node, op=SWAPS[type(node.op)]()))
        case ast.Constant():
            for v in constants(node.value): add('constant', ast.Constant(v))
        case ast.UnaryOp(op=ast.Not() | ast.USub()): add('not, minus', node.operand)
        case ast.Slice():
            if node.lower and not isinstance(node.lower, ast.Constant): add('slice', number(node.lower, 1), node.lower)
            if node.upper and not isinstance(node.upper, ast.Constant): add('slice', number(node.upper, -1), node.upper)
        case ast.Lambda(): add('return', ast.Constant(None), node.body)
        case ast.Return(value=ast.expr()): add('return', ast.Constant(None), node.value)
        case ast.Call():
            for k in node.keywords:
                if k.arg: add('argument', but(node, keywords=[o for o in node.keywords if o is not k]))
            if isinstance(node.func, ast.Name) and node.func.id in TWINS: add('twin', but(node.func, id=TWINS[node.func.id]), node.func)
            if isinstance(node.func, ast.Attribute) and node.func.attr in TWINS: add('twin', but(node, func=but(node.func, attr=TWINS[node.func.attr])))
    for test in [node.test] if isinstance(node, (ast.If,ast.IfExp,ast.While)) else getattr(node, 'ifs', []):
        for v in (True,False): add('condition', ast.Constant(v), test)
    stored = isinstance(node, ast.Assign) and not all(isinstance(n, ast.Name) for t in node.targets for n in getattr(t, 'elts', [t]))
    if stored or isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): add('statement', ast.Pass())
    return out

def walk(node):
    "The nodes that may be changed"
    if isinstance(node, NOT_CHANGED) or getattr(node, 'name', '')=='__repr__': return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant): return # a docstring
    if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '')=='__all__': return
    yield node
    for field,value in ast.iter_fields(node):
        if field in ('annotation','returns','decorator_list'): continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST): yield from walk(child)

def mutants(module:str) -> list: # [(record, source)]
    "Every mutant of `module`"
    text = (ROOT/'hba_fastai'/f'{module}.py').read_text()
    lines,out = [l.encode() for l in text.splitlines(keepends=True)],{}
    for node in walk(ast.parse(text)):
        for kind,old,new in changes(node):
            a,b = old.lineno-1,old.end_lineno
            first,last = lines[a][:old.col_offset],lines[b-1][old.end_col_offset:]
            code = ast.unparse(new) if isinstance(new, (ast.stmt,ast.Constant,ast.Name)) else f'({ast.unparse(new)})'
            before,after = b''.join(lines[a:b]).decode(),(first+code.encode()+last).decode()
            record = dict(module=module, line=a+1, kind=kind, before=before.strip(), after=after.strip())
            out[key(record)] = record,''.join([b''.join(lines[:a]).decode(),after,b''.join(lines[b:]).decode()])
    return list(out.values())

def key(record) -> tuple: return tuple(record[k] for k in ('module','before','after'))

def sample(module:str, n:int, seed:int) -> list:
    "`n` of the mutants of `module`, the same ones when another line of it has changed"
    return sorted(mutants(module), key=lambda m: crc32(repr((seed,key(m[0]))).encode()))[:n]

# --- who notices it

class Mutated(SourceFileLoader):
    "Finds and loads one module, from the source that it is given"
    def __init__(self, module, source):
        super().__init__(f'hba_fastai.{module}', str(ROOT/'hba_fastai'/f'{module}.py'))
        self.source = source
    def find_spec(self, name, path, target=None): return spec_from_file_location(name, self.path, loader=self) if name==self.name else None
    def get_code(self, name): return compile(self.source, self.path, 'exec')

class FirstFailure:
    "What a run of pytest fails at first"
    failed = ''
    def note(self, report):
        if report.failed: self.failed = self.failed or report.nodeid
    pytest_runtest_logreport = pytest_collectreport = note

def run_examples(notebook:Path):
    "Run the cells of `notebook` that are not exported, in a copy of its module's names"
    cells = [''.join(c['source']) for c in json.loads(notebook.read_text())['cells'] if c['cell_type']=='code']
    module, = [c.split()[-1] for c in cells if c.replace(' ', '').startswith('#|default_exp')]
    names = {**vars(import_module(f'hba_fastai.{module}')), '__name__': 'examples'}
    for c in cells:
        if not c.replace(' ', '').startswith(('#|default_exp','#|export','#|slow','#|cuda','#|notest')): exec(c, names)

def noticed(module:str, source:str) -> str:
    "What notices that `module` has this source, in a process of its own"
    sys.meta_path.insert(0, Mutated(module, source))
    try: import_module(f'hba_fastai.{module}')
    except Exception: return 'import'
    tests = [ROOT/t for t in TESTS[module]]
    for t in tests:
        try:
            if t.suffix=='.ipynb': run_examples(t)
        except Exception: return t.name
    first = FirstFailure()
    os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1' # they would warn that they are imported already
    where = ['--rootdir',str(ROOT),'-c',str(ROOT/'pyproject.toml'),'--basetemp','pytest']
    files = [str(t) for t in tests if '.py' in t.name]
    code = pytest.main(['-x','-q','-p','no:cacheprovider',*where,'-k',f"not ({' or '.join(NOT_RUN)})",*files], plugins=[first])
    return first.failed.split('[')[0] or ('survived' if code==0 else 'import')

def outcome(module:str, source:str) -> str:
    "`noticed`, in a fork that works in a folder of its own, with a limit of time"
    folder,(r,w) = tempfile.mkdtemp(),os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid(); os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT,LIMIT))
        signal.alarm(10*LIMIT)
        for fd in (1,2): os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        try: os.write(w, noticed(module, source).encode())
        finally: os._exit(0)
    os.close(w)
    _,status = os.waitpid(pid, 0)
    try: os.killpg(pid, signal.SIGKILL) # processes that it has left
    except ProcessLookupError: pass
    said = os.read(r, 1000).decode()
    os.close(r)
    shutil.rmtree(folder, ignore_errors=True)
    return said or ('time' if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU,signal.SIGALRM,signal.SIGKILL) else 'died')

# --- the table

def read() -> dict: return {key(r): r for r in map(json.loads, FILE.read_text().splitlines())} if FILE.exists() else {}

def write(records:dict):
    text = [json.dumps(r, ensure_ascii=False)+'\n' for r in sorted(records.values(), key=lambda r: (r['module'],r['line']))]
    (part := FILE.with_suffix('.tmp')).write_text(''.join(text))
    part.replace(FILE)

def run(module:str, n:int, seed:int, again:bool):
    "The mutants of `module` that are missing; `again`: those that have survived and have no reason to"
    clean,records = time.time(),read()
    says = outcome(module, (ROOT/'hba_fastai'/f'{module}.py').read_text())
    if says!='survived': sys.exit(f'The tests of {module} fail without a mutant: {says}')
    print(f'{module}: {time.time()-clean:.0f} s without a mutant', flush=True)
    for r,source in sample(module, n, seed):
        known = records.get(key(r))
        if known and not (again and known['now']=='survived' and not known.get('why')): continue
        began,now = time.time(),outcome(module, source)
        write({**read(), key(r): {**r, 'first': now, **(known or {}), 'line': r['line'], 'now': now}})
        print(f"{module}:{r['line']} {r['kind']}, {time.time()-began:.0f} s: {now}" + f"\n    {r['before']}\n    {r['after']}"*(now=='survived'), flush=True)

def report(seed:int) -> str:
    "The table, and what nobody could notice or needs to"
    all_ = list(read().values())
    out = ['Of a sample of the changes that can be made to a module, how many its tests notice. Score: of those that matter; '
           'the tests are those in `TESTS` of the script, others may notice more. So the score before is a lower bound.\n']
    out += ['| module | changes | sample | noticed before | noticed now | do not matter | score before | score now |', '|'+' --- |'*8]
    for m in TESTS:
        rs = [r for r in all_ if r['module']==m]
        if not rs: continue
        matter = [r for r in rs if not r.get('why')]
        noticed = {k: sum(r[k]!='survived' for r in matter) for k in ('first','now')}
        out.append(f"| {m} | {len(mutants(m))} | {len(rs)} | {noticed['first']} | {noticed['now']} | {len(rs)-len(matter)} | "
                   + ' | '.join(f'{100*noticed[k]/len(matter):.0f}%' for k in noticed) + ' |')
    out += ['\nThose that do not matter, and why:\n', '| where | before | after | why |', '|'+' --- |'*4]
    code = lambda t: f"`` {' '.join(t.split())} ``".replace('|', '\\|')
    out += [f"| {r['module']}:{r['line']} | {code(r['before'])} | {code(r['after'])} | {r['why']} |" for r in all_ if r.get('why')]
    left = [f"{r['module']}:{r['line']}, {code(r['before'])} to {code(r['after'])}" for r in all_ if r['now']=='survived' and not r.get('why')]
    if left: out += ['\nNot noticed: ' + '; '.join(left) + '.']
    versions = f'Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}'
    command = ' '.join(['python benchmarks/mutants.py',*dict.fromkeys(r['module'] for r in all_)])
    return '\n'.join([*out, f'\n`{command}`, seed {seed}, {datetime.date.today()}, {versions}.\n'])

if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('modules', nargs='+', choices=TESTS)
    parser.add_argument('--n', type=int, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--again', action='store_true')
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT),str(ROOT/'tests')]
    for name in BEFORE: import_module(name)
    torch.set_num_threads(1)
    for module in args.modules: run(module, args.n, args.seed, args.again)
    FILE.with_suffix('.md').write_text(report(args.seed))

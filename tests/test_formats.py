"PBA's text schedules and timm's strings: the same effect as there, the same numbers back, and files of strangers"
import json,random,re
from pathlib import Path
import numpy as np
import pytest,timm.data.auto_augment as theirs,torch
from PIL import Image,ImageEnhance,ImageOps
from hba_fastai.all import AutoAugment,PBASpace,RandAugment,Schedule,ScheduleError,Space,TABLE7,from_timm
from hba_fastai.formats import FILE,PBA_OPS,magnitude,read_pba
from hba_fastai.ops import OP,OP_NAMES,apply_ops
from hba_fastai.pixels import hole_lines
from hba_fastai.search_free import CHOICES
from hba_fastai.space import ENHANCERS

PUBLISHED = Path(__file__).parent/'schedules'/'pba'
FILES = {'rcifar10': (200,[12,22,20,20,1,6,3,27,6,21,6,9,7,17,6,12,5]), 'rsvhn': (160,[9,15,6,8,7,24,6,25,4,4,39,6,6,1])}
BEYOND = 'ignore:.*become 6.4' # Cutout, of which both have more than there is here
space = PBASpace()

def file(name): return PUBLISHED/f'{name}_16_wrn.txt',FILES[name][0]
def line(before, after, epoch=3, run='0', copied='0'): return repr([run,copied,epoch,epoch,before,after])

# --- PBA: reading

@pytest.mark.parametrize('name', FILES)
def test_the_published_schedules(name):
    f,epochs = file(name)
    segments = read_pba(f, epochs)
    assert [n for n,_ in segments]==FILES[name][1] and sum(FILES[name][1])==epochs
    assert segments[0][1]==[0]*60 and all(len(ints)==60 for _,ints in segments)

@pytest.mark.filterwarnings(BEYOND, 'ignore:.*do not reach the magnitudes')
def test_a_byte_order_mark_and_numbers_of_numpy(tmp_path):
    f = random_schedule().to_pba(tmp_path/'f.txt', epochs=np.int64(4))
    (tmp_path/'g.txt').write_bytes(b'\xef\xbb\xbf'+f.read_bytes())
    assert read_pba(tmp_path/'g.txt', np.int64(4))==read_pba(f, 4)

def test_the_order_of_the_operations_is_that_of_pba():
    "As its source fixes it since https://github.com/arcelien/pba/issues/20"
    assert PBA_OPS==['Rotate','TranslateX','TranslateY','Brightness','Color','Invert','Sharpness','Posterize','ShearX','Solarize','ShearY','Equalize',
                     'AutoContrast','Cutout','Contrast'] and set(PBA_OPS)==set(TABLE7)
    with pytest.warns(UserWarning, match='become 6.4'): s = Schedule.from_pba(*file('rcifar10'))
    v = s.values(0.99) # the last policy begins [0, 6, 6, 6, 10, 0, ...] and ends [..., 5, 2, 7, 6]
    assert [v[f'{o}_0.p'] for o in PBA_OPS[:3]]==[0,0.6,1.] and (v['TranslateX_0.m'],v['Contrast_1.p'],v['Cutout_1.p'])==(6/32,0.7,0.5)

@pytest.mark.parametrize('name', FILES)
def test_each_batch_of_each_epoch_has_the_policy_of_that_epoch(name):
    f,epochs = file(name)
    with pytest.warns(UserWarning, match='Cutout of up to 18 of 32 pixels'): s = Schedule.from_pba(f, epochs=epochs)
    policies = [ints for n,ints in read_pba(f, epochs) for _ in range(n)]
    for e,ints in enumerate(policies):
        for batch in (0,30): # of 31
            v = s.values((e+batch/31)/epochs)
            for i,(o,c) in enumerate([(o,c) for c in (0,1) for o in PBA_OPS]):
                assert v[f'{o}_{c}.p']==pytest.approx(ints[2*i]/10, abs=1e-8) # at the very start of an epoch a rounding away from the last
                if TABLE7[o]: assert v[f'{o}_{c}.m']==pytest.approx(magnitude(o, ints[2*i+1]), abs=1e-5)

def pil(o, level, x):
    "What the source of PBA does to 32 pixels at a level from 0 to 9"
    affine = lambda *c: x.transform((32,32), Image.AFFINE, c)
    whole = lambda most: int(level*most/10)
    if o in ENHANCERS: return getattr(ImageEnhance, o)(x).enhance(level*1.8/10+0.1)
    return {'Rotate': lambda: x.rotate(whole(30)), 'TranslateX': lambda: affine(1,0,whole(10),0,1,0), 'TranslateY': lambda: affine(1,0,0,0,1,whole(10)),
            'ShearX': lambda: affine(1,level*0.3/10,0,0,1,0), 'ShearY': lambda: affine(1,0,0,level*0.3/10,1,0),
            'Solarize': lambda: ImageOps.solarize(x, 256-whole(256)), 'Posterize': lambda: ImageOps.posterize(x, 4-whole(4)),
            'Invert': lambda: ImageOps.invert(x), 'Equalize': lambda: ImageOps.equalize(x), 'AutoContrast': lambda: ImageOps.autocontrast(x)}[o]()

@pytest.mark.parametrize('o', [o for o in OP_NAMES if o!='Cutout'])
def test_the_effect_is_that_of_pba_on_pillow(o, tmp_path):
    "After the way of a replay by λ; a factor that λ rounds can move a level, which Pillow truncates, by one"
    x = torch.randint(0, 256, (1,3,32,32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x[0,:,:16,:16] = torch.arange(256).view(16,16) # each level in each channel
    for level in range(10):
        ints = [n for p in PBA_OPS*2 for n in (5,0 if p=='Cutout' else level)]
        (tmp_path/'f.txt').write_text(line(ints, ints))
        v = dict(zip(space.names, space.values(Schedule.from_pba(tmp_path/'f.txt', epochs=4).lam(0.5)).tolist()))
        m = torch.tensor([[v.get(f'{o}_0.m', 0.)]])
        ours = apply_ops(x.clone(), torch.tensor([[OP[o]]]), m, torch.zeros(1,1,2), torch.zeros(3), False, False, None)[0]
        want = torch.tensor(np.array(pil(o, level, Image.fromarray(x[0].permute(1,2,0).numpy())))).permute(2,0,1)
        assert (ours.int()-want.int()).abs().max() <= (o in ENHANCERS), level

@pytest.mark.parametrize('level', range(10))
def test_holes_of_up_to_six_pixels_are_as_large(level):
    row,_ = hole_lines(torch.tensor(magnitude('Cutout', level)), torch.tensor([0.5,0.5]), 32, 32)
    assert (row>0).sum()==2*min(level, 3) # 0.2 of 32 is 6.4: beside a pixel's border 6

# --- PBA: writing

@pytest.mark.filterwarnings(BEYOND)
@pytest.mark.parametrize('name', FILES)
def test_what_was_read_is_written_again_number_by_number(name, tmp_path):
    f,epochs = file(name)
    s = Schedule.from_pba(f, epochs=epochs)
    for again in (s, Schedule.load(s.save(tmp_path/'s.json'))):
        assert read_pba(again.to_pba(tmp_path/'f.txt', epochs=epochs), epochs)==[(n,ints) for n,ints in read_pba(f, epochs)]
    assert Schedule.from_pba(tmp_path/'f.txt', epochs=epochs)==s

def random_schedule(seed=0, **kw):
    generator = torch.Generator().manual_seed(seed)
    return Schedule(torch.linspace(0, 1, 7), space.lo + (space.hi-space.lo)*torch.rand(7, 54, generator=generator).double(), **kw)

@pytest.mark.filterwarnings(BEYOND)
@pytest.mark.parametrize('sigma', [0.,1.])
def test_any_schedule_comes_back_within_half_a_step(sigma, tmp_path):
    "Half a tenth, half a level; what lies beyond the levels comes back at their end. λ rounds a position by 1e-6"
    s = random_schedule(sigma=sigma)
    with pytest.warns(UserWarning, match='do not reach the magnitudes of .*TranslateX.*Posterize'): f = s.to_pba(tmp_path/'f.txt', epochs=11)
    back = Schedule.from_pba(f, epochs=11)
    for e in range(11):
        given = dict(zip(space.names, space.expected(space.lam(s.at((e+0.5)/11)), sigma).tolist()))
        for name,v in back.values((e+0.5)/11).items():
            o = name.split('_')[0]
            levels = [magnitude(o, l) for l in range(10)] if name.endswith('m') else [l/10 for l in range(11)]
            reached = min(max(given[name], levels[0]), levels[-1])
            assert abs(v-reached) <= max(b-a for a,b in zip(levels, levels[1:]))/2 + 1e-5

@pytest.mark.filterwarnings(BEYOND)
def test_a_schedule_that_was_changed_is_not_written_as_it_was_read(tmp_path):
    f,epochs = file('rcifar10')
    s = Schedule.from_pba(f, epochs=epochs)
    s.table[:,space.names.index('Rotate_0.p')] = 0.7
    changed = read_pba(s.to_pba(tmp_path/'f.txt', epochs=epochs), epochs)
    assert all(ints[0]==7 for _,ints in changed)
    Schedule(s.progress, s.table, 0., s.provenance, inactive='Rotate').to_pba(tmp_path/'g.txt', epochs=epochs)
    assert all(ints[0]==ints[30]==0 for _,ints in read_pba(tmp_path/'g.txt', epochs))

@pytest.mark.parametrize('odd', [7,None,{},{'segments': 3},{'segments': [[1]]},{'segments': [[1,[0]*60]]},{'segments': [['x',[0]*60]]},
                                 {'segments': [[4,[0]*59]]},{'segments': [[-1,[0]*60],[5,[0]*60]]},{'segments': [[float('inf'),[0]*60]]},{'segments': []}])
def test_a_provenance_that_says_something_else_is_not_believed(odd, tmp_path):
    values = space.lo.clone()
    values[space.names.index('Invert_0.p')] = 0.6
    values[space.names.index('Posterize_0.m')] = 4
    s = Schedule([0.], values[None], 0., {'pba': odd})
    assert read_pba(s.to_pba(tmp_path/'f.txt', epochs=4), 4)[0][1][10]==6

@pytest.mark.filterwarnings('ignore:In tenths|The levels of PBA')
@pytest.mark.parametrize('m,level', [(0.199,3),(0.2,3),(0.14,2),(0.03,0)])
def test_the_nearest_level_of_cutout_is_that_of_pba_and_not_of_the_bound_here(m, level, tmp_path):
    values = space.values(space.start().double())
    values[space.names.index('Cutout_0.m')],values[space.names.index('Cutout_0.p')] = m,0.5
    i = 2*PBA_OPS.index('Cutout')
    assert read_pba(Schedule([0.], values[None], 0.).to_pba(tmp_path/'f.txt', 4), 4)[0][1][i:i+2]==[5,level]

def test_what_a_file_cannot_say_is_refused_or_said(tmp_path):
    values = torch.cat([torch.full((1,1), 0.1),space.lo[None]], 1)
    mixed = Schedule([0.], values, spaces={'Noise': Space(noise=(0,0.2)), 'PBAPolicy': None})
    with pytest.raises(ScheduleError, match='of Noise and PBAPolicy and a PBA file can only hold those of PBAPolicy: use `save`'): mixed.to_pba(tmp_path/'f', 3)
    for epochs in (0,-1,2.5,True,'3',None,10**7):
        with pytest.raises(ScheduleError, match='epochs is'): random_schedule().to_pba(tmp_path/'f', epochs)
    with pytest.warns(UserWarning, match=r'In tenths .* add up to 0.00 instead of 1.20'):
        Schedule([0.], torch.where(torch.arange(54)<30, 0.04, space.lo+0.1)[None], 0.).to_pba(tmp_path/'f', 3)
    assert [f.name for f in tmp_path.iterdir()]==['f']

# --- PBA: files of strangers

policy = [0]*60
BAD = {'code': ("__import__('os').system('true')", 'line 1: it is not a list of six'), 'nothing': ('', 'is empty'), 'five': ("['0','0',1,1,[]]", 'list of six'),
       'text': ('hello', 'list of six'), 'number': ('7', 'list of six'), 'bytes': (b'\xff\xfe\x00', 'line 1'), 'nested': ('['*60_000, 'list of six'),
       'unary': ('-'*60_000+'1', 'list of six'), 'sum': ('1+'*30_000+'1', 'list of six'), 'digits': ('9'*60_000, 'list of six'),
       'objects': ('{"a":'*10_000, 'list of six'), 'long': ('[' + ' '*70_000 + ']', 'more than 65,536 characters'),
       'large': (b'\n'*(FILE+1), 'bytes, which no PBA schedule has'), 'epoch': (line(policy, policy, -1), 'its epoch is -1'),
       'epoch text': (line(policy, policy, 'x'), "its epoch is 'x'"), 'short': (line(policy, policy[1:]), '30 pairs'),
       'probability': (line([11,0]*30, policy), '30 pairs'), 'level': (line([1,10]*30, policy), '30 pairs'), 'real': (line([0.5,0]*30, policy), '30 pairs'),
       'other config': (line({'lr': 0.1}, policy), '30 pairs'), 'not a list': (line('0'*60, policy), '30 pairs'),
       'backwards': (line(policy, policy, 3)+'\n'+line(policy, policy, 2), r'at the epochs \[3, 2\] and is said to have 4'),
       'too few': (line(policy, policy, 5), r'at the epochs \[5\] and is said to have 4'), 'ten': ('[0,0,0,0,0,0,0,0,0,0]', 'list of six')}

@pytest.mark.parametrize('what', BAD)
def test_files_that_cannot_be_used(what, tmp_path):
    content,match = BAD[what]
    (tmp_path/'f.txt').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ScheduleError, match=match) as e: Schedule.from_pba(tmp_path/'f.txt', epochs=4)
    assert '\n' not in str(e.value) and len(str(e.value)) < 200+len(str(tmp_path))

def test_other_ways_to_write_the_same(tmp_path):
    "JSON, dictionaries of the search with more in them, blank lines, Windows, and lines of another chain in front"
    a,b = [1,2]*30,[3,4]*30
    configs = [dict(hp_policy=o, lr=None, gpu=True) for o in (a,b)]
    for text in (json.dumps(['1','0',3,3,*configs]), f'\n{line(a, b)}\r\n\r\n', line(b, a, 2, '7', '5')+'\n'+line(a, b), repr(('1','0',3,3,*configs))):
        (tmp_path/'f.txt').write_text(text, newline='')
        assert read_pba(tmp_path/'f.txt', 10)==[(3,a),(7,b)]
    (tmp_path/'f.txt').write_text(line(a, b, 0)) # copied before its first epoch
    assert read_pba(tmp_path/'f.txt', 10)==[(10,b)]
    for epochs in (None,'10',9.5,True,-1,0):
        with pytest.raises(ScheduleError, match='is said to have'): Schedule.from_pba(tmp_path/'f.txt', epochs)

@pytest.mark.filterwarnings(BEYOND)
def test_a_damaged_file_is_a_schedule_or_an_error_in_one_sentence(tmp_path):
    f,epochs = file('rsvhn')
    whole,rng,refused = f.read_bytes(),random.Random(0),0
    for _ in range(150):
        data = bytearray(whole[:rng.choice([len(whole),len(whole)//3])])
        for _ in range(rng.choice([1,3,30])):
            at = rng.randrange(len(data)+1)
            data[at:at+rng.choice([0,1,1,400])] = rng.choice([b'', b'\n', b'9', b',', b']', b"'", b'-', b'1e999', bytes([rng.randrange(256)])])
        (tmp_path/'f.txt').write_bytes(data)
        try: assert len(Schedule.from_pba(tmp_path/'f.txt', epochs=epochs))>1
        except ScheduleError as e:
            refused += 1
            assert '\n' not in str(e) and str(e).count(': ')>=1
    assert 50 < refused < 150 # some digits are as good as others

# --- timm

def nearly(config, **kw):
    "The policy, and what is said of it"
    with pytest.warns(UserWarning, match=re.escape(repr(config))) as said: policy = from_timm(config, **kw)
    assert len(said)==1
    return policy,str(said[0].message)

@pytest.mark.parametrize('m', range(11))
def test_rand_has_timms_operations_at_timms_magnitudes(m):
    "Of the operations of both; Translate goes to 150/331 here and to 0.45 there, Solarize from 1 in steps of 25.5 here, of 25.6 without fraction there"
    policy,said = nearly(f'rand-m{m}-inc1')
    ops = {o.name.removesuffix('Increasing').removesuffix('Rel'): o for o in theirs.rand_augment_transform(f'rand-m{m}-inc1').ops}
    mine = {OP_NAMES[c] for c in CHOICES if c>=0}
    assert mine-set(ops)==set() and set(ops)-mine=={'Invert','SolarizeAdd'} and 'Invert and SolarizeAdd' in said and type(policy) is RandAugment
    for name,o in ops.items():
        if name not in mine or not o.level_fn: continue
        args = {o.level_fn(o.magnitude, o.hparams)[0] for _ in range(40)}
        ours = set(policy.magnitudes[OP[name],policy.m].tolist())
        if name=='Posterize': assert f'drops {next(iter(ours)):.0f} bits instead of {8-args.pop()}' in said
        elif name=='Solarize': assert abs(256-ours.pop()-args.pop())<2
        else: assert sorted(ours)==pytest.approx(sorted(args), abs=1e-6 + 0.1*(name in ENHANCERS and m==10), rel=0.01*name.startswith('Translate'))

@pytest.mark.parametrize('config', ['rand-m9-mstd0.5-inc1','rand-m7-n3-mstd0.5-inc1','rand-inc1','rand-m5-p1.0-n1-inc1','rand-m20-inc1','rand-m8-mmax6-inc1'])
def test_rand_has_as_many_operations(config):
    policy,said = nearly(config)
    timms = theirs.rand_augment_transform(config)
    prob,magnitude_ = timms.ops[0].prob,min(timms.ops[0].magnitude, timms.ops[0].magnitude_max or 10)
    assert (policy.slots,policy.p,policy.m)==(timms.num_layers,prob,3*magnitude_)
    assert f'RandAugment({policy.slots}, {policy.m}, p={policy.p:g})' in said and ('does not vary' in said)==('mstd' in config)
    n,share = 20_000*policy.slots,prob*13/14 # one of 14 does nothing
    on = (policy.draw_under(torch.zeros(20_000,0), torch.Generator().manual_seed(0)).op>=0).float().mean().item()
    assert abs(on-share) < 5*(share*(1-share)/n)**0.5

def test_original_has_timms_pairs():
    policy,said = nearly('original-mstd0.5', bilinear=True)
    theirs_ = [[(o.name.removesuffix('Original'),o.prob) for o in pair] for pair in theirs.auto_augment_transform('original', {}).policy]
    ours = [[(OP_NAMES[o],round(p, 6)) for o,p in zip(*pair)] for pair in zip(policy.op.tolist(), policy.p.tolist())]
    assert ours==theirs_ and type(policy) is AutoAugment and policy.bilinear and 'Solarize and Posterize get stronger' in said

REFUSED = {
    'rand-m9-mstd0.5': "no 'inc1'", 'rand-m9-inc0': "no 'inc1'", 'rand': "no 'inc1'", 'rand-m15-mmax20-inc1': 'magnitude 15', 'rand-m9.5-inc1': 'magnitude 9.5',
    'rand-m9-n0-inc1': '0 operations', 'rand-m9-p0-inc1': 'probability 0', 'rand-m9-p2-inc1': 'probability 2', 'rand-m9-mstd101-inc1': 'mstd101',
    'rand-m9-mstd2-inc1': 'mstd2', 'rand-m9-tweights-inc1': "'tweights'", 'rand-m9-t3a-inc1': "'t3a'", 'rand-m9-w0-inc1': "'w0'", 'rand-m9-inc': "'inc'",
    'rand-m9-m5-inc1': "'m5'", 'rand--m9': "''", 'rand-m9-x3': "'x3'", 'original-m9': "'m' to AutoAugment", 'originalr': 'Posterize', 'v0': 'SolarizeAdd',
    'v0r-mstd0.5': 'SolarizeAdd', '3a': 'a blur', 'augmix-m5-w4-d2': 'a mixture', '': "''", 'rand m9': "'rand m9'", 'ta_wide': "'ta_wide'", 9: '9'}

@pytest.mark.parametrize('config', REFUSED)
def test_what_no_policy_does_is_refused_by_its_name(config):
    with pytest.raises(ValueError, match=re.escape(REFUSED[config])) as e: from_timm(config)
    assert '\n' not in str(e.value) and ': ' in str(e.value)

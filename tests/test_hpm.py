"Learned mutation: the teacher's gradients are right and leave students as they were; a copy's λ and network are what the teacher says"
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner # with `fit_one_cycle`
from conftest import small_net
from hba_fastai.data import digits_dls
from hba_fastai.hpm import HPM,Student
from hba_fastai.hypernet import HyperNet
from hba_fastai.modules import evaluating
from hba_fastai.teacher import FORMS,Lessons,Teacher,length,mutate,told

DLS = digits_dls(60, 40, bs=20, size=8)

def hpm(*cbs, # functions that make callbacks
        n=3, epochs=3, **kwargs):
    pop = HPM(lambda: Learner(DLS, small_net(), cbs=[cb() for cb in cbs]), n, **{**dict(share=0.3, warmup=0.), **kwargs})
    pop.logger = lambda line: None
    pop.fit_one_cycle(epochs, 1e-2)
    return pop

def double_net():
    "Hyper-layers in float64 that respond to three numbers, and a batch"
    torch.manual_seed(0)
    model = small_net().double()
    net = HyperNet([('0',model[0]),('1',model[1])], 3)
    for p,_ in net.params: p.data.normal_(0, 3)
    return model,net,(torch.rand(20,3,12,12).double(),torch.randint(10, (20,)))

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('of', ['position','logit'])
@pytest.mark.parametrize('bound', [9.,0.001])
def test_gradients_of_the_teacher_equal_finite_differences(form, of, bound):
    "In V and W, through the factors, the bound and the response of a network"
    model,net,(x,y) = double_net()
    lam,active = torch.tensor([0.5,-1.,0.7]).double(),torch.tensor([True,True,False])
    teacher = Teacher(3, 2, form, noise=0.5).double()
    def loss(l):
        with evaluating(model):
            net.respond(l[None])
            try: return F.cross_entropy(model(x), y)
            finally: net.respond(None)
    at = lambda: loss(mutate(teacher, lam, active, 1., of, bound)[0]).item()
    with net.attached(lam):
        says,size = told(teacher, loss, lam, active, 1., of, bound),length(mutate(teacher, lam, active, 1., of, 99.)[0]-lam, 1., active)
        assert says['loss']==at() and (size>bound)==(bound<1) # the bound acts in one case
        for k,p in dict(V=teacher.V, W=teacher.W).items():
            assert says[k].norm()>1e-8
            for i in range(p.numel()):
                flat,eps = p.data.view(-1),1e-5
                flat[i] += eps; up = at()
                flat[i] -= 2*eps; down = at()
                flat[i] += eps
                assert says[k].view(-1)[i]==pytest.approx((up-down)/(2*eps), rel=1e-5, abs=2e-10), (k,i) # third derivatives by eps², 1e-16/eps of rounding

def test_v_learns_nothing_where_columns_of_w_are_equal():
    "With softmax: the reason for the noise in W"
    lam,loss = torch.randn(5),lambda l: l.square().sum()
    equal,noisy = Teacher(5, noise=0.),Teacher(5)
    of_v = lambda t: told(t, loss, lam, torch.ones(5).bool(), 1.)['V'].abs().max()
    assert of_v(equal)==0 and of_v(noisy)>0

def test_a_change_stays_within_its_bound():
    for seed in range(20):
        teacher,lam,active = Teacher(30, seed=seed, noise=3.),3*torch.randn(30),torch.rand(30)<0.7
        for of in ('position','logit'):
            new,g = mutate(teacher, lam, active, 0.5, of, 0.8)
            assert length(new-lam, 0.5, active)<=0.8+1e-5 and torch.equal(new[~active], lam[~active]) and (0<=g).all() and (g<=2).all()

class State(Callback):
    "What a student is, just before and just behind the moment in which the teacher asks it"
    def __init__(self, order, seen): self.order,self.seen = order,seen
    def after_epoch(self):
        if self.learn.student.net is None: return # an epoch that is left out
        m = self.learn.model
        state = {**m.state_dict(), **{f'{k}.grad': p.grad for k,p in m.named_parameters()}, **{f'{k}.mode': o.training for k,o in m.named_modules()}}
        phi = {i: p for i,(p,_) in enumerate(self.learn.student.net.params)}
        self.seen.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k,v in {**state, **phi}.items()})

def test_the_teacher_leaves_students_as_they_were(monkeypatch):
    asked,plain = [],Student.tell
    monkeypatch.setattr(Student, 'tell', lambda self: asked.append(plain(self)) or asked[-1])
    before,behind = [],[]
    hpm(lambda: State(14, before), lambda: State(16, behind), n=2, epochs=2)
    assert len(asked)==4 and all(o['W'].abs().max()>0 for o in asked[2:])
    for a,b in zip(before, behind):
        for k in a: assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k]==b[k], k

class First(Callback):
    "λ, z of the plain network and what the teacher says, at the first batch of each fit"
    order,run_valid = 20,False
    def before_fit(self): self.new = True
    def before_batch(self):
        cb = self.learn.student
        if self.new: seen.append((self.learn.epoch,cb.role.i,cb.lam.value.clone(),(cb.net.ref-cb.z(cb.lam.value)).abs().max().item(),cb.tfms[0].lam().clone()))
        self.new = False

seen = []

def test_a_copy_goes_on_where_the_teacher_sends_it_and_its_network_follows():
    seen.clear()
    pop = hpm(First, lr=1., every=1)
    first = {(e,i): (lam,off,of_policy) for e,i,lam,off,of_policy in seen}
    lessons,made = Lessons(Teacher(54, seed=0), 1.),pop.frame().dropna(subset='donor')
    assert made.epoch.tolist()==[2,3] and made.moved.between(0.05, 1).all() and made.predicted.abs().min()>0
    for e,i,donor in zip(made.epoch-1, made.member, made.donor):
        lam,off,of_policy = first[e,i]
        assert torch.equal(lam, of_policy) and off<1e-6
        at = pop.rounds[e-1]['donors'][i]
        assert at==donor
        if (e,int(donor)) in first: # which has not moved since its file was written
            step = (lam-first[e,int(donor)][0]).square().mean().sqrt()
            assert step==pytest.approx(made[(made.epoch==e+1)&(made.member==i)].moved.item(), rel=1e-4)
    assert pop.lessons.teacher.W.abs().max()>0.5>0.1>lessons.teacher.W.abs().max() # it has learned

@pytest.mark.parametrize('kw', [
    dict(mutation='gradient'), dict(hyper_training=False), dict(share=0, mutation='none', spread=1.5),
    dict(of='logit', form='leaky_relu'), dict(centred=False, condition='lambda', strategy='conv')])
def test_ablations_and_forms(kw):
    pop = hpm(n=2, **{'share': 0.5, **kw})
    f,lams = pop.frame(),[m.read()['search']['lams'] for m in pop.members]
    copied = f.dropna(subset='donor') if 'donor' in f else f[:0]
    assert len(copied)==(0 if kw.get('share')==0 else 2)
    assert ('factor' in f)==(kw.get('mutation') not in ('gradient','none'))
    if len(copied): assert (copied.moved>0).all() and copied.predicted.notna().all()
    if kw.get('hyper_training') is False: # λ moves in jumps alone
        assert all(((l.diff(dim=0)!=0).any(1).sum().item()<=1+(len(l)>5)) for l in lams)

@pytest.mark.filterwarnings('ignore:.*too short for a hyper-step') # of a gradient
def test_nothing_is_copied_before_lambda_moves_or_behind_it():
    pop = hpm(n=2, share=0.5, warmup=0.6)
    assert [any(k is not None for k in r['donors']) for r in pop.rounds]==[False,True,False] and 'teacher_loss' not in pop.rounds[0]
    late = hpm(n=2, share=0.5, target=DLS.valid, until=0.4)
    assert [any(k is not None for k in r['donors']) for r in late.rounds]==[True,False,False]

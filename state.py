from common import *
import copy, numpy as np, random
from weakspot import attacks, regions, defenses, Linf
import inspect
def snap(m,tens):
    return dict(mode={n:k.training for n,k in m.named_modules()}, rg={n:p.requires_grad for n,p in m.named_parameters()}, grad={n:(None if p.grad is None else p.grad.clone()) for n,p in m.named_parameters()}, w={n:p.clone() for n,p in m.state_dict().items()}, hooks={n:{k:list(v.keys()) for k,v in vars(kk).items() if k.endswith('_hooks') and isinstance(v,dict)} for n,kk in m.named_modules()}, attrs={n:sorted(vars(kk)) for n,kk in m.named_modules()}, rng=torch.get_rng_state(), nr=str(np.random.get_state()), pr=random.getstate(), dd=torch.get_default_dtype(), ge=torch.is_grad_enabled(), det=torch.are_deterministic_algorithms_enabled(), nt=torch.get_num_threads(), bench=torch.backends.cudnn.benchmark, mk=torch.backends.mkldnn.flags if 0 else None, prec=torch.get_float32_matmul_precision(), filt=list(map(str,warnings.filters)), t=[x.clone() for x in tens], tg=[x.requires_grad for x in tens], tgr=[x.grad for x in tens], fids={n:id(vars(kk).get('forward')) for n,kk in m.named_modules()})
def same(a,b):
    if isinstance(a,torch.Tensor): return isinstance(b,torch.Tensor) and torch.equal(a.nan_to_num(),b.nan_to_num())
    if isinstance(a,dict): return a.keys()==b.keys() and all(same(a[k],b[k]) for k in a)
    if isinstance(a,(list,tuple)): return len(a)==len(b) and all(same(x,y) for x,y in zip(a,b))
    return a==b
class D(CNN):
    def forward(s,x): return {'aux':torch.zeros(len(x),2,8,8),'logits':super().forward(x)}
class T(ViT):
    def forward(s,x): return (super().forward(x),None)
for name,cls in (('cnn',D),('vit',T)):
    m=mk(cls); m.train()
    if name=='cnn': m.f[0].eval()
    calls=[0]
    m.h.register_forward_hook(lambda *a: calls.__setitem__(0,calls[0]+1))
    for p in m.parameters(): p.grad=torch.ones_like(p)
    list(m.parameters())[1].requires_grad_(False)
    x=imgs(3); x.requires_grad_(); 
    with torch.no_grad(): y=weakspot.Classifier.wrap(m)(x).argmax(1)
    pr=attacks.pgd(m,x,y,budget=Linf(.1),steps=3)
    pairs=weakspot.Pairs(x,pr.adversarial.clone().requires_grad_(),y,pr.targets)
    tens=[x,y,pairs.adversarial]
    jobs={n:(lambda n=n:(lambda f:f(m,x,y,**{k:v for k,v in {'steps':10,'iterations':3}.items() if k in inspect.signature(f).parameters}))(getattr(attacks,n))) for n in attacks.available_attacks() if hasattr(attacks,n)}
    jobs.update({'ws':lambda:weakspot.weak_spots(m,x,y,grid=2),'sq':lambda:weakspot.smallest_square(m,x,y,budget=Linf(.1)),'occ':lambda:weakspot.occlusion(m,x,y,cell=4),'cam':lambda:weakspot.class_activation(m,x,y),'explain':lambda:weakspot.explain(m,pairs),'prop':lambda:weakspot.propagation(m,pairs),'study':lambda:weakspot.propagation_study(m,pairs),'rest':lambda:weakspot.restoration(m,pairs,cell=4),'prom':lambda:weakspot.promotion_suppression(m,pairs,cell=4),'loc':lambda:weakspot.locality(m,pairs,radius=3),'ssim':lambda:weakspot.ssim_alignment(m,pairs,random_weights=True),'interp':lambda:weakspot.interpretability_score(m,pairs),'ur':lambda:weakspot.unit_restoration(m,'f.2' if name=='cnn' else 'e',pairs),'us':lambda:weakspot.unit_sensitivity(m,'f.2' if name=='cnn' else 'e',pairs),'cp':lambda:weakspot.certify_pixels(m,x,y,seconds=1),'cpa':lambda:weakspot.certify_patches(m,x,y,masks=2),'of':lambda:weakspot.Pairs.of(m,x,pairs.adversarial),'bg':lambda:regions.background(x,model=m,classes=y),'rspec':lambda:regions.read_region('superpixels',m,x,y),'ed':lambda:defenses.evaluate_defense(m,defenses.neutralizing(m),x,y,steps=2,queries=20,draws=2),'sweep':lambda:attacks.pixel_sweep(m,x,y) })
    for k,f in jobs.items():
        a=snap(m,tens)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore'); a['filt']=list(map(str,warnings.filters)); f(); b=snap(m,tens)
        except Exception as e: print(name,k,'EXC',type(e).__name__,str(e)[:200]); b=snap(m,tens); a['filt']=b['filt']
        for q in a:
            if not same(a[q],b[q]): print(name,k,'CHANGED',q, [z for z in a[q] if not same(a[q][z],b[q][z])][:5] if isinstance(a[q],dict) else '')

from common import *
warnings.simplefilter('ignore')
from weakspot import attacks, regions, Linf, L2, L1, SSIM
import inspect
quick={'steps':5,'iterations':3}
for name,cls,sh in (('cnn',CNN,(3,16,16)),('vit',ViT,(3,16,16))):
    m=mk(cls,seed=3).double() if 0 else mk(cls,seed=3)
    x=imgs(4,*sh); y=m(x).argmax(1)
    p=torch.tensor([2,0,3,1])
    def cmp(label,f):
        try:
            a=f(x,y); b=f(x[p],y[p]); c=f(x[2:3],y[2:3])
        except Exception as e: print(label,'EXC',type(e).__name__,str(e)[:150]); return
        for k in a:
            d=(a[k][p].double()-b[k].double()).abs().nan_to_num(0,0,0).max().item(); e=(a[k][2:3].double()-c[k].double()).abs().nan_to_num(0,0,0).max().item()
            nn_=(a[k][2:3].double().isnan()!=c[k].double().isnan()).any().item()
            if d>1e-4 or e>1e-4 or nn_: print(name,label,k,'perm',d,'single',e,nn_)
    for n in attacks.available_attacks():
        if not hasattr(attacks,n): continue
        f=getattr(attacks,n); sig=inspect.signature(f).parameters
        q={k:v for k,v in quick.items() if k in sig}
        for bud in ((Linf(.05),L2(.5),L1(5),SSIM(.01)) if 'budget' in sig else (None,)):
            kw=dict(q); 
            if bud is not None: kw['budget']=bud
            def g(im,lb):
                r=f(m,im,lb,**kw); return {'adv':r.adversarial,'nf':r.n_forward,'nb':r.n_backward,'s':r.success}
            cmp(n+str(bud),g)
    cmp('sq',lambda i,l:(lambda r:{'side':r.side,'top':r.top,'left':r.left,'nf':r.pairs.n_forward})(weakspot.smallest_square(m,i,l,budget=Linf(.1))))
    cmp('ws',lambda i,l:(lambda r:{'size':r.size,'lv':r.levels,'fo':r.first_order})(weakspot.weak_spots(m,i,l,grid=2)))
    cmp('cam',lambda i,l:{'c':weakspot.class_activation(m,i,l)})
    cmp('occ',lambda i,l:{'c':weakspot.occlusion(m,i,l,cell=4)})
    cmp('reg',lambda i,l:{'c':regions.cam(m,i,l).float()})
    cmp('bg',lambda i,l:{'c':regions.background(i,model=m,classes=l).float()})

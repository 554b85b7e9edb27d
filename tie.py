from common import *
from weakspot import Linf, attacks
class Tie(nn.Module):
    def forward(s,x):
        a=x.flatten(1).mean(1); d=(a-0.5).clamp(min=0)  # 0 at clean
        g=x[:,:,2:4,2:4].flatten(1).mean(1)
        return torch.stack([g-0.5, g*0+ (g-0.5), -g*0-5],1) 
class Tie2(nn.Module):
    # logits tie exactly at the clean image, gradient nonzero
    def forward(s,x):
        g=x[:,:,2:4,2:4].flatten(1).mean(1)-0.5
        return torch.stack([g, -g, g*0-5],1)
m=Tie2().eval(); x=torch.full((1,1,8,8),0.5)
print('pred',m(x).argmax(1), m(x))
for lab in (0,1):
    L=torch.tensor([lab])
    r=weakspot.smallest_square(m,x,L,budget=Linf(0.1)); print('label',lab,r, r.needed, r.side, r.pairs.success)
    w=weakspot.weak_spots(m,x,L,grid=4); print(w, w.size.min(), w.size.isnan().sum(), w.levels.unique(), w.adversarial_class.unique())
    w=weakspot.weak_spots(m,x,L,grid=4,effort='estimate'); print(w)
    for n in ('pgd','fgsm','bim','minimal_pgd','fmn','few_pixel'):
        a=getattr(attacks,n)(m,x,L); print(n,a,a.success,a.targets,a.success_8bit)
    c=weakspot.certify_pixels(m,x,L); print(c, c.status.unique(), c.predicted)
    c=weakspot.certify_patches(m,x,L,patch=2,masks=2); print(c, c.certified, c.predicted)

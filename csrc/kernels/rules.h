// The optimizers' formulas, each once for every processor and type.
//
// prepare() makes the rule's scalars from hyper-parameters and the number of the step, in float64. update() is done to every
// element: weight p, gradient g, moments s[0..2] in the order of optim.cc's table, for T one number or a register of them. The
// order of operations, and where a product is fused with a sum, is that of torch.optim's fused or foreach kernels, so that
// float32 agrees with them. With `keras` weight decay is decoupled, as in Keras.
// A rule with kNorms needs two norms per tensor first: of the weight, and of what measured() returns; adapt() takes them in.
#pragma once

#include <string.h>

#include "kernels/arith.h"
#include "kernels/optim_table.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

// L2 regularization through the gradient.
template <class T, class S>
HOST_DEVICE T decayed(T g, T p, S decay) {
  return decay == 0 ? g : Math<T>::fused(p, Math<T>::splat(decay), g);
}

// What weight decay multiplies the weight by, and what it adds of the weight to the gradient.
struct Decay {
  double keep, through_gradient;
  HOST_DEVICE Decay(double lr, double weight_decay, bool decoupled)
      : keep(decoupled ? 1 - lr * weight_decay : 1), through_gradient(decoupled ? 0 : weight_decay) {}
};

// Sutskever et al. 2013 as torch.optim.SGD states it (the learning rate outside the buffer) or as Keras does (inside).
struct Sgd {
  static constexpr int kStates = 1;
  static constexpr bool kNorms = false;
  template <class S>
  struct Scalars {
    S keep, decay, momentum, old, fresh, rate;
  };

  HOST_DEVICE static Scalars<double> prepare(const double* hyper, double step, RuleOptions o) {
    const double lr = hyper[0], momentum = hyper[1], dampening = hyper[2];
    const Decay decay(lr, hyper[3], o.keras);
    const bool first = step == 1 && !o.keras;  // torch's buffer begins as the gradient itself
    const double fresh = o.keras ? -lr : first ? 1 : 1 - dampening;
    return {decay.keep, decay.through_gradient, momentum, first ? 0 : momentum, fresh, -lr};
  }

  template <class T, class S>
  HOST_DEVICE static void update(T& p, T g, T* s, const Scalars<S>& c, RuleOptions o) {
    const auto rate = Math<T>::splat(c.rate), momentum = Math<T>::splat(c.momentum);
    p = p * c.keep;
    g = decayed(g, p, c.decay);
    if (!o.momentum) {
      p = Math<T>::fused(g, rate, p);
      return;
    }
    s[0] = Math<T>::fused(g, Math<T>::splat(c.fresh), s[0] * c.old);
    if (o.keras)
      p = p + (o.nesterov ? Math<T>::fused(s[0], momentum, g * rate) : s[0]);
    else
      p = Math<T>::fused(o.nesterov ? Math<T>::fused(s[0], momentum, g) : s[0], rate, p);
  }
};

// Adam, Kingma & Ba 2015; with `decoupled` AdamW, Loshchilov & Hutter 2019; with `amsgrad` Reddi et al. 2018. torch.optim has
// eps beside the corrected root, Keras beside the uncorrected one ("epsilon hat").
struct Adam {
  static constexpr int kStates = 3;
  static constexpr bool kNorms = false;
  template <class S>
  struct Scalars {
    S keep, decay, weight1, beta2, weight2, correction, eps, rate;
  };

  HOST_DEVICE static Scalars<double> prepare(const double* hyper, double step, RuleOptions o) {
    const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2];
    const Decay decay(lr, hyper[4], o.decoupled || o.keras);
    const double bias1 = 1 - ::pow(beta1, step), bias2 = ::sqrt(1 - ::pow(beta2, step));
    const double rate = o.keras ? -(lr * bias2 / bias1) : -(lr / bias1);
    return {decay.keep, decay.through_gradient, 1 - beta1, beta2, 1 - beta2, o.keras ? 1 : bias2, hyper[3], rate};
  }

  template <class T, class S>
  HOST_DEVICE static void update(T& p, T g, T* s, const Scalars<S>& c, RuleOptions o) {
    p = p * c.keep;
    g = decayed(g, p, c.decay);
    s[0] = lerp(s[0], g, c.weight1);
    s[1] = Math<T>::fused(g * c.weight2, g, s[1] * c.beta2);
    if (o.amsgrad) s[2] = maximum(s[2], s[1]);
    p = p + s[0] * c.rate / (Math<T>::root_over(o.amsgrad ? s[2] : s[1], c.correction) + c.eps);
  }
};

// RMSprop, Hinton 2012, with momentum, and centered as Graves 2013 has it. Keras has eps inside the root and the learning rate
// inside the momentum.
struct RmsProp {
  static constexpr int kStates = 3;
  static constexpr bool kNorms = false;
  template <class S>
  struct Scalars {
    S keep, decay, alpha, weight, eps, momentum, rate;
  };

  HOST_DEVICE static Scalars<double> prepare(const double* hyper, double, RuleOptions o) {
    const Decay decay(hyper[0], hyper[3], o.keras);
    return {decay.keep, decay.through_gradient, hyper[1], 1 - hyper[1], hyper[2], hyper[4], -hyper[0]};
  }

  template <class T, class S>
  HOST_DEVICE static void update(T& p, T g, T* s, const Scalars<S>& c, RuleOptions o) {
    p = p * c.keep;
    g = decayed(g, p, c.decay);
    s[0] = Math<T>::fused(g * c.weight, g, s[0] * c.alpha);
    T variance = s[0];
    if (o.centered) {
      s[2] = lerp(s[2], g, c.weight);
      variance = Math<T>::fused(-s[2], s[2], variance);
    }
    const T scale = o.keras ? Math<T>::root(variance + c.eps) : Math<T>::root(variance) + c.eps;
    if (!o.momentum)
      p = p + g * c.rate / scale;
    else if (o.keras)
      p = p - (s[1] = s[1] * c.momentum - g * c.rate / scale);
    else
      p = Math<T>::fused(s[1] = s[1] * c.momentum + g / scale, Math<T>::splat(c.rate), p);
  }
};

// Adagrad, Duchi et al. 2011; Keras has eps inside the root.
struct Adagrad {
  static constexpr int kStates = 1;
  static constexpr bool kNorms = false;
  template <class S>
  struct Scalars {
    S keep, decay, eps, rate;
  };

  HOST_DEVICE static Scalars<double> prepare(const double* hyper, double step, RuleOptions o) {
    const Decay decay(hyper[0], hyper[2], o.keras);
    return {decay.keep, decay.through_gradient, hyper[3], -(hyper[0] / (1 + (step - 1) * hyper[1]))};
  }

  template <class T, class S>
  HOST_DEVICE static void update(T& p, T g, T* s, const Scalars<S>& c, RuleOptions o) {
    p = p * c.keep;
    g = decayed(g, p, c.decay);
    s[0] = Math<T>::fused(g, g, s[0]);
    p = p + g * c.rate / (o.keras ? Math<T>::root(s[0] + c.eps) : Math<T>::root(s[0]) + c.eps);
  }
};

// Lion, Chen et al. 2023: the sign of one average moves the weight, the other one is kept.
struct Lion {
  static constexpr int kStates = 1;
  static constexpr bool kNorms = false;
  template <class S>
  struct Scalars {
    S keep, weight1, weight2, rate;
  };

  HOST_DEVICE static Scalars<double> prepare(const double* hyper, double, RuleOptions) {
    return {1 - hyper[0] * hyper[3], 1 - hyper[1], 1 - hyper[2], -hyper[0]};
  }

  template <class T, class S>
  HOST_DEVICE static void update(T& p, T g, T* s, const Scalars<S>& c, RuleOptions) {
    p = p * c.keep + sign(lerp(s[0], g, c.weight1)) * c.rate;
    s[0] = lerp(s[0], g, c.weight2);
  }
};

// LAMB, You et al. 2020: Adam's direction and the decay together, as long as the weight. A norm of 0 leaves the length
// alone. Keras decays the weight first, and neither its direction nor the ratio of the norms sees more of it.
struct Lamb {
  static constexpr int kStates = 2;
  static constexpr bool kNorms = true;
  template <class S>
  struct Scalars {
    S keep, decay, weight1, beta2, weight2, bias1, bias2, eps, rate;
  };

  HOST_DEVICE static Scalars<double> prepare(const double* hyper, double step, RuleOptions o) {
    const Decay decay(hyper[0], hyper[4], o.keras);
    const double beta1 = hyper[1], beta2 = hyper[2];
    const double bias1 = 1 - ::pow(beta1, step), bias2 = ::sqrt(1 - ::pow(beta2, step));
    return {decay.keep, decay.through_gradient, 1 - beta1, beta2, 1 - beta2, bias1, bias2, hyper[3], -hyper[0]};
  }

  template <class T, class S>
  HOST_DEVICE static T measured(T p, T g, T* s, const Scalars<S>& c) {
    s[0] = lerp(s[0], g, c.weight1);
    s[1] = Math<T>::fused(g * c.weight2, g, s[1] * c.beta2);
    return decayed(s[0] / c.bias1 / (Math<T>::root_over(s[1], c.bias2) + c.eps), p, c.decay);
  }

  HOST_DEVICE static void adapt(Scalars<double>& c, double weight, double direction) {
    if (weight > 0 && direction > 0) c.rate *= c.keep * weight / direction;
  }

  template <class T, class S>
  HOST_DEVICE static void update(T& p, T g, T* s, const Scalars<S>& c, RuleOptions) {
    const T direction = measured(p, g, s, c);  // one of the two decays is none
    p = p * c.keep + direction * c.rate;
  }
};

// LARS, You et al. 2017: momentum SGD whose rate grows with the ratio of the weight's norm to the gradient's. The paper, and
// `keras`, have the learning rate inside the momentum; without it it stays outside, as in torch's SGD.
struct Lars {
  static constexpr int kStates = 1;
  static constexpr bool kNorms = true;
  template <class S>
  struct Scalars {
    S decay, momentum, fresh, rate, eps, trust;
  };

  HOST_DEVICE static Scalars<double> prepare(const double* hyper, double, RuleOptions o) {
    const double lr = hyper[0];
    return {hyper[2], hyper[1], o.keras ? lr : 1, o.keras ? -1 : -lr, hyper[3], hyper[4]};
  }

  template <class T, class S>
  HOST_DEVICE static T measured(T, T g, T*, const Scalars<S>&) {
    return g;
  }

  HOST_DEVICE static void adapt(Scalars<double>& c, double weight, double gradient) {
    if (weight > 0 && gradient > 0) c.fresh *= c.trust * weight / (gradient + c.decay * weight + c.eps);
  }

  template <class T, class S>
  HOST_DEVICE static void update(T& p, T g, T* s, const Scalars<S>& c, RuleOptions o) {
    T change = decayed(g, p, c.decay) * c.fresh;
    if (o.momentum) {
      s[0] = s[0] * c.momentum + change;
      change = o.nesterov ? s[0] * c.momentum + change : s[0];
    }
    p = p + change * c.rate;
  }
};

// f(Rule{}) for the rule of that name.
template <class F>
void with_rule(RuleId id, F f) {
  switch (id) {
    case RuleId::Sgd:
      return f(Sgd{});
    case RuleId::Adam:
      return f(Adam{});
    case RuleId::RmsProp:
      return f(RmsProp{});
    case RuleId::Adagrad:
      return f(Adagrad{});
    case RuleId::Lion:
      return f(Lion{});
    case RuleId::Lamb:
      return f(Lamb{});
    case RuleId::Lars:
      return f(Lars{});
  }
}

// Scalars<float> or Scalars<double> of what prepare() has left in memory.
template <class Scalars, class S>
HOST_DEVICE Scalars scalars_from(const double* from) {
  constexpr int count = sizeof(Scalars) / sizeof(S);
  static_assert(count <= kMaxScalars, "kMaxScalars");
  S members[count];
  for (int i = 0; i < count; ++i) members[i] = static_cast<S>(from[i]);
  Scalars to;
  memcpy(&to, members, sizeof(to));
  return to;
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels

// What the rules are called, and their moments and hyper-parameters.
#include "base/error.h"
#include "kernels/optim.h"

namespace roundel::kernels {
namespace {

constexpr const char* kNames[kRules] = {"sgd", "adam", "rmsprop", "adagrad", "lion", "lamb", "lars"};

}  // namespace

const char* name_of(RuleId rule) { return kNames[static_cast<int>(rule)]; }

RuleId rule_named(const std::string& name) {
  for (int i = 0; i < kRules; ++i)
    if (name == kNames[i]) return static_cast<RuleId>(i);
  throw InvalidArgument(
      format("optimizer rule: expected sgd, adam, rmsprop, adagrad, lion, lamb or lars, got '%s'", name.c_str()));
}

std::vector<StateName> state_names(RuleId rule, RuleOptions options) {
  std::vector<StateName> names;
  switch (rule) {
    case RuleId::Sgd:
    case RuleId::Lars:
      if (options.momentum) names = {{"momentum_buffer", 0}};
      break;
    case RuleId::Adam:
      names = {{"exp_avg", 0}, {"exp_avg_sq", 1}};
      if (options.amsgrad) names.push_back({"max_exp_avg_sq", 2});
      break;
    case RuleId::RmsProp:
      names = {{"square_avg", 0}};
      if (options.momentum) names.push_back({"momentum_buffer", 1});
      if (options.centered) names.push_back({"grad_avg", 2});
      break;
    case RuleId::Adagrad:
      names = {{"sum", 0}};
      break;
    case RuleId::Lion:
      names = {{"exp_avg", 0}};
      break;
    case RuleId::Lamb:
      names = {{"exp_avg", 0}, {"exp_avg_sq", 1}};
      break;
  }
  return names;
}

std::vector<std::string> hyper_names(RuleId rule, RuleOptions options) {
  std::vector<std::string> names;
  switch (rule) {
    case RuleId::Sgd:
      names = {"lr", "momentum", "dampening", "weight_decay"};
      break;
    case RuleId::Adam:
    case RuleId::Lamb:
      names = {"lr", "beta1", "beta2", "eps", "weight_decay"};
      break;
    case RuleId::RmsProp:
      names = {"lr", "alpha", "eps", "weight_decay", "momentum"};
      break;
    case RuleId::Adagrad:
      names = {"lr", "lr_decay", "weight_decay", "eps"};
      break;
    case RuleId::Lion:
      names = {"lr", "beta1", "beta2", "weight_decay"};
      break;
    case RuleId::Lars:
      names = {"lr", "momentum", "weight_decay", "eps", "trust_coefficient"};
      break;
  }
  if (options.average) names.emplace_back("ema_decay");
  return names;
}

bool needs_steps(RuleId rule, RuleOptions options) {
  const bool by_formula = rule == RuleId::Adam || rule == RuleId::Lamb || rule == RuleId::Adagrad ||
                          (rule == RuleId::Sgd && options.momentum && !options.keras);
  return by_formula || options.stochastic;
}

}  // namespace roundel::kernels

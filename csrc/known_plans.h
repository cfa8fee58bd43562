// The plans that calls of the registered operators were served by, for the calls that follow: to be looked up without
// the GIL, from any thread.
#pragma once

#include <memory>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>

#include "plan.h"

namespace divnorm {

// What a plan depends on of a call of an operator.
struct CallKey {
  // backend: empty where none is named.
  CallKey(std::string_view norm, std::string_view backend, const torch::View& x, bool residual);
  bool operator==(const CallKey& other) const;
  size_t hash() const;

  std::string_view norm, backend;
  PlanKey x;
};

class KnownPlans {
 public:
  // The plan for a call, or null.
  std::shared_ptr<const Plan> find(const CallKey& key) const;
  // With the GIL. `owner` is Python's object of the plan.
  void add(const CallKey& key, const pybind11::object& owner);
  size_t size() const;

 private:
  struct Entry {
    std::string norm, backend;  // what the key refers to
    CallKey key;
    std::shared_ptr<const Plan> plan;
  };

  mutable std::shared_mutex mutex_;
  std::unordered_map<size_t, std::unique_ptr<const Entry>> entries_;  // by hash; of two with the same, the later one
};

}  // namespace divnorm
